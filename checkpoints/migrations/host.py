"""The revisions of this package in an application's own history.

They run as part of the application's revision: on its connection, in its transactions, and into its
script with `--sql`. The application's history stays a straight line, so that `upgrade head` and
`current --check-heads` mean what they meant.
"""

from __future__ import annotations

import logging

from alembic.runtime.migration import MigrationContext
from alembic.script import Script
from sqlalchemy import DDL

from checkpoints.errors import MigrationRefused
from checkpoints.migrations import revisions
from checkpoints.migrations.installed import ddl, follow, installed_revision, record
from checkpoints.migrations.revisions import BASE, literal, quoted
from checkpoints.migrations.running import Op, prepared, proxied, run
from checkpoints.tables import DEFAULT_SCHEMA

__all__ = ["downgrade", "upgrade"]

# Below `alembic`, so that an application's alembic.ini shows what runs.
_log = logging.getLogger("alembic.checkpoints")

# A script says from where it goes; the database may say something else.
_EXPECT = """
DO $$
BEGIN
  IF to_regtype(%(type)s) IS %(not_)sNULL
     OR obj_description(to_regtype(%(type)s), 'pg_type') <> %(comment)s THEN
    RAISE EXCEPTION USING MESSAGE = %(message)s;
  END IF;
END $$
"""


def upgrade(op: Op, *, to: str, schema: str = DEFAULT_SCHEMA, from_: str | None = None) -> None:
    """Upgrade the tables to a revision of this package, within a revision of the application.

    `op` is `alembic.op`. `from_` is the revision before, `base` for the first installation; without
    it, what the database records counts, and `--sql` is refused. What the database has already is
    passed over, as after an interruption; nothing is done if it is at `to` or later. The schema is
    made if it is missing.

    Some revisions commit in between, and what the command `alembic` ran before them in the same
    transaction with them. So give this a revision of its own in the application, and set
    `transaction_per_migration=True` in env.py, which makes this the rule.

    Timeouts of the session are off meanwhile, but a lock is waited for in short turns. One
    migration of a schema runs at a time, and another is refused until this transaction has ended.

    Raises:
        MigrationRefused: The migration cannot be run as it was asked for: the database is before
            `from_`, or at a revision that is not known here; `from_` is missing with `--sql`; or
            a revision has to commit, and the transaction is not Alembic's. Roll back.
        TypeError, ValueError: `to` or `from_` is not the name of a revision that this installation
            has; `head` is none, since it would mean another one with the next release.
    """
    first = revisions.known()[1]
    _run(
        op, _Way(up=True, to=revisions.revision("to", to, least=first), from_=from_, schema=schema)
    )


def downgrade(op: Op, *, to: str, schema: str = DEFAULT_SCHEMA, from_: str | None = None) -> None:
    """Downgrade the tables to a revision of this package, or to `base`: all of them are dropped.

    As `upgrade` otherwise. `from_` is the revision that the application's upgrade led to. The
    schema is left, with what else lies in it.

    Raises:
        MigrationRefused: As `upgrade`; and if the database is at a later revision than `from_`.
        TypeError, ValueError: `to` or `from_` is not the name of a revision.
    """
    _run(op, _Way(up=False, to=revisions.revision("to", to), from_=from_, schema=schema))


class _Way:
    """Where a migration goes from, where to, and in which schema."""

    def __init__(self, *, up: bool, to: str, from_: str | None, schema: str) -> None:
        self.up = up
        self.to = to
        self.from_ = None if from_ is None else revisions.revision("from_", from_)
        self.schema = revisions.schema_name("schema", schema)
        if self.from_ is not None and self.is_before(to, self.from_):
            beyond = "before" if up else "after"
            raise ValueError(f"to must not be {beyond} from_, {from_!r}: {to!r}")

    def is_before(self, one: str, other: str) -> bool:
        """Whether this way passes one revision before it comes to the other."""
        names = revisions.known()
        return (names.index(one) < names.index(other)) is self.up and one != other

    def steps(self, start: str) -> list[tuple[Script, str, str]]:
        """The revisions to run, each with the revision before and the one after it."""
        names = revisions.known()
        low, high = sorted((names.index(start), names.index(self.to)))
        steps = list(
            zip(revisions.scripts()[low:high], names[low:], names[low + 1 :], strict=False)
        )
        return steps if self.up else [(each, after, before) for each, before, after in steps[::-1]]


def _run(op: Op, way: _Way) -> None:
    context = op.get_context()
    if context.dialect.name != "postgresql":
        raise MigrationRefused(
            f"checkpoints needs PostgreSQL, and this migration is for {context.dialect.name!r}"
        )
    if context.as_sql and way.from_ is None:
        verb = "upgrade" if way.up else "downgrade"
        raise MigrationRefused(
            "a script cannot ask the database which revision of checkpoints it is at: give it, as "
            f"migrations.{verb}(op, from_=…, to={way.to!r}, schema={way.schema!r})"
        )
    with prepared(context, way.schema), proxied(op):
        start = _start(context, way)
        if context.as_sql:
            context.execute(_expected(way, start))
        for script, before, after in way.steps(start):
            _log.info("Running %s -> %s of checkpoints", before, after)
            run(
                context,
                script.module.upgrade if way.up else script.module.downgrade,
                revision=script.revision,
                before=before,
                after=after,
                schema=way.schema,
            )
            context.execute(follow(way.schema, before, after))


def _start(context: MigrationContext, way: _Way) -> str:
    """The revision that the way begins at; `way.to` if there is nothing to do."""
    if context.as_sql or context.connection is None:
        return str(way.from_)
    found = installed_revision(context.connection, schema=way.schema) or BASE
    if found == "unknown":
        if way.from_ in {None, BASE}:
            raise MigrationRefused(
                f"the schema {way.schema!r} has tables of checkpoints, but does not say of which "
                "revision: give it as from_"
            )
        context.execute(record(way.schema, way.from_))
        return str(way.from_)
    if found not in revisions.known():
        raise MigrationRefused(
            f"the schema {way.schema!r} is at revision {found!r} of checkpoints, which this "
            f"installation, at {revisions.head()!r}, does not know: install the version of "
            "checkpoints that made it"
        )
    if found == way.to or way.is_before(way.to, found):
        _log.info("The schema %s is at %s of checkpoints: nothing to do", way.schema, found)
        return way.to
    if way.from_ is not None and way.is_before(found, way.from_):
        raise MigrationRefused(
            f"the schema {way.schema!r} is at revision {found!r} of checkpoints, and not at "
            f"from_, {way.from_!r}: run the migration that leads there first"
        )
    return found


def _expected(way: _Way, start: str) -> DDL:
    """A part of a script that ends it if the database is at another revision."""
    return ddl(
        _EXPECT,
        type=literal(f"{quoted(way.schema)}.checkpoint_status"),
        not_="NOT " if start == BASE else "",
        comment=literal(f"revision {start} of checkpoints"),
        message=literal(
            f"the schema {way.schema} is not at revision {start} of checkpoints, from which this "
            "script goes"
        ),
    )
