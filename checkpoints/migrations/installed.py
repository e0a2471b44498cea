"""Which revision a schema is at: recorded in the database, read and checked.

The record is a comment on the type `checkpoint_status`. A comment on the schema would need to own
the schema, which may be the application's; one on a table is part of the table to whoever compares
tables. The type is there from the first revision to the last, and pg_dump keeps its comment.
"""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import (
    DDL,
    Connection,
    MetaData,
    Table,
    column,
    event,
    func,
    select,
    table,
    text,
)

from checkpoints.errors import WrongSchemaRevision
from checkpoints.migrations import revisions
from checkpoints.migrations.revisions import BASE, literal, quoted
from checkpoints.tables import DEFAULT_SCHEMA, metadata

__all__ = ["installed_revision", "verify"]

# `alembic/env.py` writes the same.
_COMMENT = "revision {} of checkpoints"
_WRITTEN = re.compile(r"revision (\S+) of checkpoints")

# Not there: the revision was the last on the way down, or Alembic's stamp was given no tables.
_RECORD = """
DO $$
BEGIN
  IF to_regtype(%(type_literal)s) IS NOT NULL THEN
    COMMENT ON TYPE %(type)s IS %(comment)s;
  END IF;
END $$
"""

# The version table of the migrations that are run on their own: who ran those before, and now has
# them in the application's, could run them once more otherwise.
_FOLLOW = """
DO $$
BEGIN
  IF to_regclass(%(table_literal)s) IS NOT NULL THEN
    %(change)s;
  END IF;
END $$
"""

_namespace = table("pg_namespace", column("oid"), column("nspname"), schema="pg_catalog")
_type = table(
    "pg_type", column("oid"), column("typname"), column("typnamespace"), schema="pg_catalog"
)
_class = table(
    "pg_class", column("oid"), column("relname"), column("relnamespace"), schema="pg_catalog"
)


def installed_revision(connection: Connection, *, schema: str | None = None) -> str | None:
    """The revision that a schema is at, as the database records it; it changes nothing.

    None if the tables are not there, "unknown" if they are and nothing is recorded. `schema` is
    None for the one that the connection's statements use: that of its `schema_translate_map`, or
    else `checkpoints`. It reads the catalogue, and needs no rights on the schema.

    Raises:
        TypeError: `connection` is not a `Connection`.
    """
    schema = _schema_of(connection, schema)
    condition = (_namespace.c.nspname == schema, _type.c.typname == "checkpoint_status")
    query = (
        select(func.obj_description(_type.c.oid, text("'pg_type'")))
        .select_from(_type.join(_namespace, _namespace.c.oid == _type.c.typnamespace))
        .where(*condition)
    )
    found = connection.execute(query).all()
    if not found:
        return None
    if written := _WRITTEN.fullmatch(found[0][0] or ""):
        return written[1]
    return _of_version_table(connection, schema) or "unknown"


def verify(connection: Connection, *, schema: str | None = None, allow_newer: bool = False) -> None:
    """See that a schema is at the revision that this code needs; it changes nothing.

    Run it once, when the application starts; on an `AsyncConnection`, by
    `await connection.run_sync(verify)`. `schema` is None for the one that the connection's
    statements use: that of its `schema_translate_map`, or else `checkpoints`. With `allow_newer`, a
    revision that this code does not know yet passes: while an application is deployed, the schema
    goes first, and processes of the old code may still be started.

    Raises:
        WrongSchemaRevision: The tables are not there, or of an older or a newer revision. The
            message says what to do.
        TypeError: `connection` is not a `Connection`.
    """
    schema = _schema_of(connection, schema)
    found = installed_revision(connection, schema=schema)
    needed = revisions.head()
    if found == needed:
        return
    given = "" if schema == DEFAULT_SCHEMA else f" --schema {schema!r}"
    names = revisions.known()
    if found == "unknown":
        remedy = (
            "if it is at that revision, record it by `alembic stamp` in a clone, or by "
            f"`migrations.upgrade(op, from_=…, to=…, schema={schema!r})` in a revision, where "
            "both are the revision it is at"
        )
    elif found is None or found in names:
        remedy = (
            "add to the application's migrations what "
            f"`checkpoints revision --from {found or BASE}{given}` prints, and run them; "
            f"or, without any of its own, run `checkpoints migrate{given}`"
        )
    elif allow_newer:
        return
    else:
        remedy = (
            "that revision is newer than this installation of checkpoints; "
            "install the version that made it"
        )
    raise WrongSchemaRevision(schema, found, needed, remedy)


def record(schema: str, revision: str | None) -> DDL:
    """A statement that records the revision of a schema; None: it is at none."""
    name = f"{quoted(schema)}.checkpoint_status"
    return ddl(
        _RECORD,
        type=name,
        type_literal=literal(name),
        comment="NULL" if revision is None else literal(_COMMENT.format(revision)),
    )


def follow(schema: str, before: str, after: str) -> DDL:
    """A statement that moves the version table in the schema, if it is at the revision before."""
    name = f"{quoted(schema)}.alembic_version"
    where = f"WHERE version_num = {literal(before)}"
    # PL/pgSQL plans it only if the table is there. Names and texts are quoted.
    change = (
        f"DELETE FROM {name} {where}"  # noqa: S608
        if after == BASE
        else f"UPDATE {name} SET version_num = {literal(after)} {where}"  # noqa: S608
    )
    return ddl(_FOLLOW, table_literal=literal(name), change=change)


def ddl(statement: str, **context: str) -> DDL:
    return DDL(statement, context=context)  # type: ignore[no-untyped-call]


def _schema_of(connection: Connection, schema: str | None) -> str:
    if not isinstance(connection, Connection):
        raise TypeError(
            f"connection must be a Connection, not {connection!r}; of a Session it is "
            "session.connection(), and an AsyncConnection runs this by its run_sync()"
        )
    if schema is not None:
        return revisions.schema_name("schema", schema)
    translated = connection.get_execution_options().get("schema_translate_map") or {}
    given = translated.get(DEFAULT_SCHEMA, DEFAULT_SCHEMA)
    return str(given or connection.dialect.default_schema_name)


def _of_version_table(connection: Connection, schema: str) -> str | None:
    """What the version table in the schema says, of what was migrated before it was recorded."""
    readable = (
        select(_class.c.oid)
        .select_from(_class.join(_namespace, _namespace.c.oid == _class.c.relnamespace))
        .where(
            _namespace.c.nspname == schema,
            _class.c.relname == "alembic_version",
            func.has_schema_privilege(_namespace.c.oid, "USAGE"),
            func.has_table_privilege(_class.c.oid, "SELECT"),
        )
    )
    if connection.scalar(readable) is None:
        return None
    number: Any = column("version_num")
    query = select(number).select_from(table("alembic_version", schema=schema))
    found = connection.scalars(
        # It may be the application's own, in a schema of both.
        query.where(number.in_(revisions.known())),
        # The name is that of the schema already.
        execution_options={"schema_translate_map": None},
    ).all()
    return str(found[0]) if len(found) == 1 else None


@event.listens_for(metadata, "after_create")
def _record_created(
    target: MetaData, connection: Connection, *, tables: list[Table], **_: Any
) -> None:
    """`create_all()` makes the newest revision, unless it found tables that may be older."""
    if set(target.sorted_tables) <= set(tables):
        connection.execute(record(_schema_of(connection, None), revisions.head()))
