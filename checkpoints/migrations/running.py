"""Running a revision of this package on an application's connection, or into its script."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import alembic.op
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy.exc import DBAPIError

from checkpoints.errors import MigrationRefused
from checkpoints.migrations.installed import ddl, record
from checkpoints.migrations.revisions import BASE, literal, quoted

__all__ = ["Op", "prepared", "proxied", "run"]

# As `alembic/env.py` has it, which waits for the lock; here a transaction is open already. What a
# role has set for an application would cut a migration short: a backfill is one statement.
_BEGIN = """
DO $$
BEGIN
  IF NOT pg_try_advisory_lock(hashtextextended(%(lock)s, 0)) THEN
    RAISE EXCEPTION USING
      ERRCODE = 'object_in_use',
      MESSAGE = 'another migration of checkpoints in this schema is running';
  END IF;
  PERFORM set_config('checkpoints.saved_' || name, setting, false) FROM pg_settings WHERE name IN
    ('statement_timeout', 'transaction_timeout', 'idle_in_transaction_session_timeout',
     'lock_timeout', 'default_transaction_isolation');
  PERFORM set_config(name, '0', false) FROM pg_settings WHERE name IN
    ('statement_timeout', 'transaction_timeout', 'idle_in_transaction_session_timeout');
  PERFORM set_config('lock_timeout', '2s', false);
  PERFORM set_config('default_transaction_isolation', 'read committed', false);
END $$
"""

# The next one must wait until this transaction ends, not only until this function does.
_END = """
DO $$
BEGIN
  PERFORM set_config(name, current_setting('checkpoints.saved_' || name), false)
    FROM pg_settings WHERE name IN
    ('statement_timeout', 'transaction_timeout', 'idle_in_transaction_session_timeout',
     'lock_timeout', 'default_transaction_isolation');
  PERFORM pg_advisory_xact_lock(hashtextextended(%(lock)s, 0));
  PERFORM pg_advisory_unlock(hashtextextended(%(lock)s, 0));
END $$
"""

# Not CREATE SCHEMA IF NOT EXISTS: that needs the right to create one in any case.
_CREATE_SCHEMA = """
DO $$
BEGIN
  IF NOT EXISTS (SELECT FROM pg_namespace WHERE nspname = %(name)s) THEN
    CREATE SCHEMA %(schema)s;
  END IF;
END $$
"""

_NOT_ALEMBICS = (
    "revision {} of checkpoints commits in between, and the transaction that it runs in is not "
    "Alembic's: in env.py, give context.configure() a connection that is not in a transaction "
    "(engine.connect(), not engine.begin(); commit what was executed on it before), run the "
    "migrations in `with context.begin_transaction():`, and set transaction_per_migration=True"
)


class Op(Protocol):
    """What a revision calls `op`: the module `alembic.op`, or an `Operations`."""

    def get_context(self) -> MigrationContext:
        """The context that the migration runs in."""


def run(
    context: MigrationContext,
    function: Callable[[], None],
    *,
    revision: str,
    before: str,
    after: str,
    schema: str,
) -> None:
    """Run the upgrade or downgrade of a revision in a schema, and record what it led to."""
    if before == BASE:
        context.execute(ddl(_CREATE_SCHEMA, name=literal(schema), schema=quoted(schema)))
    with _in_schema(context, schema, revision):
        function()
    context.execute(record(schema, None if after == BASE else after))


@contextmanager
def prepared(context: MigrationContext, schema: str) -> Iterator[None]:
    """Have the schema to oneself, with settings that a migration can do with."""
    lock = literal(f"checkpoints migrations {schema}")
    try:
        context.execute(ddl(_BEGIN, lock=lock))
    except DBAPIError as error:
        # psycopg2, which an application may migrate with, has another name for it.
        orig = error.orig
        if "55006" not in {getattr(orig, "sqlstate", None), getattr(orig, "pgcode", None)}:
            raise
        raise MigrationRefused(
            f"another migration of checkpoints in the schema {schema!r} is running: "
            "run this one again when it has ended"
        ) from None
    try:
        yield
    except MigrationRefused:
        # The transaction still is a good one; the lock and the settings would outlive it.
        context.execute(ddl(_END, lock=lock))
        raise
    except BaseException:
        # They must not live on in a pool, and the transaction takes no more statements. It will be
        # rolled back by Alembic; one that is another's is left alone.
        if context.connection is not None and context._transaction is not None:
            context.connection.invalidate()
        raise
    context.execute(ddl(_END, lock=lock))


@contextmanager
def _in_schema(context: MigrationContext, schema: str, revision: str) -> Iterator[None]:
    """Show a revision its schema, and say what is wrong if it cannot commit."""
    given = context.version_table_schema
    autocommit_block = context.autocommit_block

    @contextmanager
    def checked() -> Iterator[None]:
        connection = context.connection
        # Alembic asserts that the transaction is its own.
        if (
            not context.as_sql
            and connection is not None
            and connection.in_transaction()
            and context._transaction is None
        ):
            raise MigrationRefused(_NOT_ALEMBICS.format(revision))
        with autocommit_block():
            yield

    context.version_table_schema = schema
    context.autocommit_block = checked  # type: ignore[method-assign]
    try:
        yield
    finally:
        context.version_table_schema = given
        del context.autocommit_block


@contextmanager
def proxied(op: Op) -> Iterator[None]:
    """Have `alembic.op`, which the revisions use, be the one that was given."""
    if not isinstance(op, Operations):
        yield
        return
    before: Any = getattr(alembic.op, "_proxy", None)
    op._install_proxy()
    try:
        yield
    finally:
        op._remove_proxy()
        if before is not None:
            before._install_proxy()
