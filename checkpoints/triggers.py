"""The functions and triggers that keep the rule, as DDL events of `checkpoints.tables.metadata`.

A BEFORE ROW trigger completes the main row; an AFTER ROW trigger moves it between the hot tables.
AFTER, because a BEFORE trigger would insert a hot row before its parent exists. A trigger, because
its inner statements see what was committed while the row lock was waited for; a statement that
moves hot rows in CTEs of its own reads them with the snapshot it began with.

The same text, frozen, stands in the Alembic revision that installs it.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import DDL, Connection, MetaData
from sqlalchemy.dialects import postgresql

__all__ = ["create_schema", "create_triggers", "drop_functions"]

# What the main row must be, whoever writes it. `process_at` of a retry (its backoff) and of a
# failed checkpoint that was scheduled are left alone; becoming failed ends what was scheduled.
_PREPROCESSOR = """
CREATE OR REPLACE FUNCTION %(schema)s.checkpoint_preprocessor() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
  IF TG_OP = 'UPDATE' THEN
    NEW.updated_at = statement_timestamp();
    IF NEW.status = 'failed' AND OLD.status <> 'failed' THEN
      NEW.process_at = NULL;
    END IF;
  END IF;
  IF NEW.status = 'active' THEN
    IF NEW.stream_version > NEW.stream_position THEN
      IF NEW.process_at IS NULL THEN
        NEW.process_at = statement_timestamp();
      END IF;
    ELSIF NEW.reserved_until IS NULL THEN
      NEW.process_at = NULL;
    END IF;
  ELSIF NEW.status = 'retry' AND NEW.process_at IS NULL THEN
    NEW.process_at = statement_timestamp();
  END IF;
  RETURN NEW;
END $$
"""

# A row is moved only when its times changed: most updates of one that is ready raise its version.
# An update of nothing, or of process_at alone, trusts no old value and projects the row anew: that
# is how repair mends.
_POSTPROCESSOR = """
CREATE OR REPLACE FUNCTION %(schema)s.checkpoint_postprocessor() RETURNS trigger
LANGUAGE plpgsql AS $$
DECLARE
  was_ready boolean = false;
  was_reserved boolean = false;
BEGIN
  IF TG_OP = 'UPDATE' THEN
    IF NEW.reserved_until IS NOT DISTINCT FROM OLD.reserved_until
       AND NEW.stream_version = OLD.stream_version
       AND NEW.stream_position = OLD.stream_position
       AND NEW.status = OLD.status THEN
      was_reserved = true;
      was_ready = true;
    ELSIF NEW.reserved_until IS NOT DISTINCT FROM OLD.reserved_until
       AND NEW.process_at IS NOT DISTINCT FROM OLD.process_at THEN
      RETURN NULL;
    ELSE
      was_reserved = OLD.reserved_until IS NOT NULL;
      was_ready = OLD.process_at IS NOT NULL AND NOT was_reserved;
    END IF;
  END IF;

  IF NEW.reserved_until IS NOT NULL THEN
    IF was_ready THEN
      DELETE FROM %(schema)s.checkpoints_ready WHERE id = NEW.id;
    END IF;
    INSERT INTO %(schema)s.checkpoints_reserved AS reserved (id, reserved_until)
    VALUES (NEW.id, NEW.reserved_until)
    ON CONFLICT (id) DO UPDATE SET reserved_until = EXCLUDED.reserved_until
    WHERE reserved.reserved_until <> EXCLUDED.reserved_until;
    RETURN NULL;
  END IF;

  IF was_reserved THEN
    DELETE FROM %(schema)s.checkpoints_reserved WHERE id = NEW.id;
  END IF;
  IF NEW.process_at IS NOT NULL THEN
    INSERT INTO %(schema)s.checkpoints_ready AS ready (id, process_at)
    VALUES (NEW.id, NEW.process_at)
    ON CONFLICT (id) DO UPDATE SET process_at = EXCLUDED.process_at
    WHERE ready.process_at <> EXCLUDED.process_at;
    -- The consumer that ends a reservation goes on by itself; others sleep and must be told.
    IF OLD.reserved_until IS NULL
       AND NEW.process_at IS DISTINCT FROM OLD.process_at
       AND coalesce(current_setting('checkpoints.notify', true), '') <> 'off' THEN
      PERFORM pg_notify(TG_TABLE_SCHEMA, subscription_groups.name)
      FROM %(schema)s.subscriptions
      JOIN %(schema)s.subscription_groups
        ON subscription_groups.id = subscriptions.subscription_group_id
      WHERE subscriptions.id = NEW.subscription_id
        AND subscriptions.status IN ('active', 'replay');
    END IF;
  ELSIF was_ready THEN
    DELETE FROM %(schema)s.checkpoints_ready WHERE id = NEW.id;
  END IF;
  RETURN NULL;
END $$
"""

_SUBSCRIPTION_NOTIFIER = """
CREATE OR REPLACE FUNCTION %(schema)s.subscription_notifier() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
  IF coalesce(current_setting('checkpoints.notify', true), '') <> 'off' THEN
    PERFORM pg_notify(TG_TABLE_SCHEMA, subscription_groups.name)
    FROM %(schema)s.subscription_groups
    WHERE subscription_groups.id = NEW.subscription_group_id;
  END IF;
  RETURN NULL;
END $$
"""

_TRIGGERS = (
    """
CREATE OR REPLACE TRIGGER checkpoint_preprocessor
BEFORE INSERT OR UPDATE ON %(schema)s.checkpoints
FOR EACH ROW EXECUTE FUNCTION %(schema)s.checkpoint_preprocessor()
""",
    """
CREATE OR REPLACE TRIGGER checkpoint_postprocessor
AFTER INSERT OR UPDATE ON %(schema)s.checkpoints
FOR EACH ROW EXECUTE FUNCTION %(schema)s.checkpoint_postprocessor()
""",
    """
CREATE OR REPLACE TRIGGER subscription_notifier
AFTER UPDATE OF status ON %(schema)s.subscriptions
FOR EACH ROW
WHEN (NEW.status IN ('active', 'replay') AND OLD.status <> NEW.status)
EXECUTE FUNCTION %(schema)s.subscription_notifier()
""",
)

_CREATE = (_PREPROCESSOR, _POSTPROCESSOR, _SUBSCRIPTION_NOTIFIER, *_TRIGGERS)

_DROP = (
    "DROP FUNCTION IF EXISTS %(schema)s.checkpoint_preprocessor()",
    "DROP FUNCTION IF EXISTS %(schema)s.checkpoint_postprocessor()",
    "DROP FUNCTION IF EXISTS %(schema)s.subscription_notifier()",
)


def create_schema(target: MetaData, connection: Connection, **_: Any) -> None:
    """Make the schema unless it is there.

    CREATE SCHEMA IF NOT EXISTS alone would need the right to create one in any case.
    """
    if not connection.dialect.has_schema(connection, _schema(target, connection)):
        _execute(target, connection, "CREATE SCHEMA IF NOT EXISTS %(schema)s")


def create_triggers(target: MetaData, connection: Connection, **_: Any) -> None:
    """Make or replace the functions and triggers, after the tables."""
    _execute(target, connection, *_CREATE)


def drop_functions(target: MetaData, connection: Connection, **_: Any) -> None:
    """Drop the functions; the triggers went with the tables."""
    _execute(target, connection, *_DROP)


def _schema(target: MetaData, connection: Connection) -> str:
    """The schema that the connection's `schema_translate_map` gives."""
    translated = connection.get_execution_options().get("schema_translate_map") or {}
    given = translated.get(target.schema, target.schema) or connection.dialect.default_schema_name
    return str(given)


def _execute(target: MetaData, connection: Connection, *templates: str) -> None:
    # A driver's paramstyle would double each % in the name, as DDL() does.
    preparer = postgresql.dialect(paramstyle="named").identifier_preparer  # type: ignore[no-untyped-call]
    quoted = preparer.quote(_schema(target, connection))
    for template in templates:
        connection.execute(DDL(template, context={"schema": quoted}))  # type: ignore[no-untyped-call]
