"""The functions and triggers that keep the rule, as DDL events of `checkpoints.tables.metadata`.

BEFORE ROW triggers complete the main row; AFTER STATEMENT triggers move rows between the hot
tables. AFTER, because a BEFORE trigger would insert a hot row before its parent exists. A trigger,
because its inner statements see what was committed while the row lock was waited for; a statement
that moves hot rows in CTEs of its own reads them with the snapshot it began with.

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

_INSERT_POSTPROCESSOR = """
CREATE OR REPLACE FUNCTION %(schema)s.checkpoint_insert_postprocessor() RETURNS trigger
LANGUAGE plpgsql AS $$
DECLARE
  has_ready boolean;
  has_reserved boolean;
BEGIN
  SELECT bool_or(process_at IS NOT NULL AND reserved_until IS NULL),
         bool_or(reserved_until IS NOT NULL)
  INTO has_ready, has_reserved
  FROM new_rows;
  IF has_ready THEN
    INSERT INTO %(schema)s.checkpoints_ready (id, subscription_id, process_at)
    SELECT id, subscription_id, process_at FROM new_rows
    WHERE process_at IS NOT NULL AND reserved_until IS NULL;
    PERFORM %(schema)s.notify_consumers(TG_TABLE_SCHEMA, ARRAY(
      SELECT DISTINCT subscription_id FROM new_rows
      WHERE process_at IS NOT NULL AND reserved_until IS NULL
    ));
  END IF;
  IF has_reserved THEN
    INSERT INTO %(schema)s.checkpoints_reserved (id, subscription_id, reserved_until)
    SELECT id, subscription_id, reserved_until FROM new_rows WHERE reserved_until IS NOT NULL;
  END IF;
  RETURN NULL;
END $$
"""

# A row is moved only when its times changed: most updates of one that is ready raise its version.
# An update of nothing, or of process_at alone (the row is touched), trusts no old value and
# projects the row anew: that is how repair mends.
#
# It runs once for a statement: four inner statements at most, for any number of rows. A single row
# goes a way of its own, without a join, which costs half as much. FULL JOIN, because a plan that
# was cached for few rows must not be a nested loop when it serves ten thousand; and because a
# changed id then reads as one row gone and another come. Without sequential scans, because the hot
# tables are next to empty most of the time: a plan that was cached then reads all of one for each
# row when there are thousands.
_POSTPROCESSOR = """
CREATE OR REPLACE FUNCTION %(schema)s.checkpoint_postprocessor() RETURNS trigger
LANGUAGE plpgsql SET enable_seqscan = off AS $$
DECLARE
  one record;
  moved record;
BEGIN
  SELECT new_rows.id, new_rows.subscription_id, new_rows.process_at, new_rows.reserved_until,
         new_rows.id = old_rows.id AND NOT EXISTS (SELECT FROM new_rows OFFSET 1) AS is_alone,
         old_rows.process_at IS NOT NULL AND old_rows.reserved_until IS NULL AS was_ready,
         old_rows.reserved_until IS NOT NULL AS was_reserved,
         new_rows.process_at IS DISTINCT FROM old_rows.process_at AS is_rescheduled,
         new_rows.process_at IS DISTINCT FROM old_rows.process_at
           OR new_rows.reserved_until IS DISTINCT FROM old_rows.reserved_until
           OR new_rows.subscription_id <> old_rows.subscription_id AS is_changed,
         new_rows.reserved_until IS NOT DISTINCT FROM old_rows.reserved_until
           AND new_rows.stream_version = old_rows.stream_version
           AND new_rows.stream_position = old_rows.stream_position
           AND new_rows.status = old_rows.status AS is_touched
  INTO one
  FROM new_rows CROSS JOIN old_rows
  LIMIT 1;
  IF NOT FOUND THEN
    RETURN NULL;
  END IF;

  IF one.is_alone THEN
    IF NOT one.is_changed AND NOT one.is_touched THEN
      RETURN NULL;
    END IF;
    IF (one.was_ready OR one.is_touched)
       AND (one.process_at IS NULL OR one.reserved_until IS NOT NULL) THEN
      DELETE FROM %(schema)s.checkpoints_ready WHERE id = one.id;
    END IF;
    IF (one.was_reserved OR one.is_touched) AND one.reserved_until IS NULL THEN
      DELETE FROM %(schema)s.checkpoints_reserved WHERE id = one.id;
    END IF;
    IF one.reserved_until IS NOT NULL THEN
      INSERT INTO %(schema)s.checkpoints_reserved AS reserved (id, subscription_id, reserved_until)
      VALUES (one.id, one.subscription_id, one.reserved_until)
      ON CONFLICT (id) DO UPDATE
      SET subscription_id = EXCLUDED.subscription_id, reserved_until = EXCLUDED.reserved_until
      WHERE (reserved.subscription_id, reserved.reserved_until)
        IS DISTINCT FROM (EXCLUDED.subscription_id, EXCLUDED.reserved_until);
    ELSIF one.process_at IS NOT NULL THEN
      INSERT INTO %(schema)s.checkpoints_ready AS ready (id, subscription_id, process_at)
      VALUES (one.id, one.subscription_id, one.process_at)
      ON CONFLICT (id) DO UPDATE
      SET subscription_id = EXCLUDED.subscription_id, process_at = EXCLUDED.process_at
      WHERE (ready.subscription_id, ready.process_at)
        IS DISTINCT FROM (EXCLUDED.subscription_id, EXCLUDED.process_at);
      -- The consumer that ends a reservation goes on by itself; others sleep and must be told.
      IF one.is_rescheduled AND NOT one.was_reserved THEN
        PERFORM %(schema)s.notify_consumers(TG_TABLE_SCHEMA, ARRAY[one.subscription_id]);
      END IF;
    END IF;
    RETURN NULL;
  END IF;

  SELECT
    array_agg(old_id) FILTER (WHERE (was_ready OR is_touched) AND NOT is_ready) AS unready_ids,
    array_agg(old_id) FILTER (WHERE (was_reserved OR is_touched) AND NOT is_reserved)
      AS unreserved_ids,
    array_agg(id) FILTER (WHERE is_reserved AND is_changed) AS reserved_ids,
    array_agg(subscription_id) FILTER (WHERE is_reserved AND is_changed)
      AS reserved_subscription_ids,
    array_agg(reserved_until) FILTER (WHERE is_reserved AND is_changed) AS reserved_untils,
    array_agg(id) FILTER (WHERE is_ready AND is_changed) AS ready_ids,
    array_agg(subscription_id) FILTER (WHERE is_ready AND is_changed) AS ready_subscription_ids,
    array_agg(process_at) FILTER (WHERE is_ready AND is_changed) AS ready_process_ats,
    array_agg(subscription_id)
      FILTER (WHERE is_ready AND is_rescheduled AND NOT was_reserved) AS told_subscription_ids
  INTO moved
  FROM (
    SELECT
      old_rows.id AS old_id,
      new_rows.id,
      new_rows.subscription_id,
      new_rows.process_at,
      new_rows.reserved_until,
      old_rows.process_at IS NOT NULL AND old_rows.reserved_until IS NULL AS was_ready,
      old_rows.reserved_until IS NOT NULL AS was_reserved,
      new_rows.process_at IS NOT NULL AND new_rows.reserved_until IS NULL AS is_ready,
      new_rows.reserved_until IS NOT NULL AS is_reserved,
      new_rows.process_at IS DISTINCT FROM old_rows.process_at AS is_rescheduled,
      touched.is_touched,
      touched.is_touched
        OR new_rows.process_at IS DISTINCT FROM old_rows.process_at
        OR new_rows.reserved_until IS DISTINCT FROM old_rows.reserved_until
        OR new_rows.subscription_id IS DISTINCT FROM old_rows.subscription_id AS is_changed
    FROM old_rows
    FULL JOIN new_rows ON new_rows.id = old_rows.id
    CROSS JOIN LATERAL (
      SELECT new_rows.reserved_until IS NOT DISTINCT FROM old_rows.reserved_until
        AND new_rows.stream_version = old_rows.stream_version
        AND new_rows.stream_position = old_rows.stream_position
        AND new_rows.status = old_rows.status AS is_touched
    ) AS touched
  ) AS changes;

  IF moved.unready_ids IS NOT NULL THEN
    DELETE FROM %(schema)s.checkpoints_ready WHERE id = ANY (moved.unready_ids);
  END IF;
  IF moved.unreserved_ids IS NOT NULL THEN
    DELETE FROM %(schema)s.checkpoints_reserved WHERE id = ANY (moved.unreserved_ids);
  END IF;
  IF moved.reserved_ids IS NOT NULL THEN
    INSERT INTO %(schema)s.checkpoints_reserved AS reserved (id, subscription_id, reserved_until)
    SELECT * FROM unnest(
      moved.reserved_ids, moved.reserved_subscription_ids, moved.reserved_untils
    )
    ON CONFLICT (id) DO UPDATE
    SET subscription_id = EXCLUDED.subscription_id, reserved_until = EXCLUDED.reserved_until
    WHERE (reserved.subscription_id, reserved.reserved_until)
      IS DISTINCT FROM (EXCLUDED.subscription_id, EXCLUDED.reserved_until);
  END IF;
  IF moved.ready_ids IS NOT NULL THEN
    INSERT INTO %(schema)s.checkpoints_ready AS ready (id, subscription_id, process_at)
    SELECT * FROM unnest(moved.ready_ids, moved.ready_subscription_ids, moved.ready_process_ats)
    ON CONFLICT (id) DO UPDATE
    SET subscription_id = EXCLUDED.subscription_id, process_at = EXCLUDED.process_at
    WHERE (ready.subscription_id, ready.process_at)
      IS DISTINCT FROM (EXCLUDED.subscription_id, EXCLUDED.process_at);
    IF moved.told_subscription_ids IS NOT NULL THEN
      PERFORM %(schema)s.notify_consumers(TG_TABLE_SCHEMA, moved.told_subscription_ids);
    END IF;
  END IF;
  RETURN NULL;
END $$
"""

# Once for a group: a notification takes a lock of the whole cluster at the commit.
_NOTIFY_CONSUMERS = """
CREATE OR REPLACE FUNCTION %(schema)s.notify_consumers(channel text, subscription_ids bigint[])
RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
  IF coalesce(current_setting('checkpoints.notify', true), '') <> 'off' THEN
    PERFORM pg_notify(channel, name)
    FROM (
      SELECT DISTINCT subscription_groups.name
      FROM %(schema)s.subscriptions
      JOIN %(schema)s.subscription_groups
        ON subscription_groups.id = subscriptions.subscription_group_id
      WHERE subscriptions.id = ANY (subscription_ids)
        AND subscriptions.status IN ('active', 'replay')
    ) AS told;
  END IF;
END $$
"""

# It runs with the rights of the role that writes, for which a trigger's function needs none.
_GRANT_NOTIFY_CONSUMERS = """
GRANT EXECUTE ON FUNCTION %(schema)s.notify_consumers(text, bigint[]) TO PUBLIC
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

# A statement that sets updated_at, as this package's do, and leaves a row that is complete, is not
# held up by a call for each row; every other one is.
_TRIGGERS = (
    """
CREATE OR REPLACE TRIGGER checkpoint_insert_preprocessor
BEFORE INSERT ON %(schema)s.checkpoints
FOR EACH ROW EXECUTE FUNCTION %(schema)s.checkpoint_preprocessor()
""",
    """
CREATE OR REPLACE TRIGGER checkpoint_preprocessor
BEFORE UPDATE ON %(schema)s.checkpoints
FOR EACH ROW
WHEN (
  NEW.updated_at <> statement_timestamp()
  OR NEW.status <> OLD.status
  OR NEW.status <> 'active'
  OR (NEW.process_at IS NULL) = (NEW.stream_version > NEW.stream_position)
)
EXECUTE FUNCTION %(schema)s.checkpoint_preprocessor()
""",
    """
CREATE OR REPLACE TRIGGER checkpoint_insert_postprocessor
AFTER INSERT ON %(schema)s.checkpoints
REFERENCING NEW TABLE AS new_rows
FOR EACH STATEMENT EXECUTE FUNCTION %(schema)s.checkpoint_insert_postprocessor()
""",
    """
CREATE OR REPLACE TRIGGER checkpoint_postprocessor
AFTER UPDATE ON %(schema)s.checkpoints
REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
FOR EACH STATEMENT EXECUTE FUNCTION %(schema)s.checkpoint_postprocessor()
""",
    """
CREATE OR REPLACE TRIGGER subscription_notifier
AFTER UPDATE OF status ON %(schema)s.subscriptions
FOR EACH ROW
WHEN (NEW.status IN ('active', 'replay') AND OLD.status <> NEW.status)
EXECUTE FUNCTION %(schema)s.subscription_notifier()
""",
)

_CREATE = (
    _NOTIFY_CONSUMERS,
    _GRANT_NOTIFY_CONSUMERS,
    _PREPROCESSOR,
    _INSERT_POSTPROCESSOR,
    _POSTPROCESSOR,
    _SUBSCRIPTION_NOTIFIER,
    *_TRIGGERS,
)

_DROP = (
    "DROP FUNCTION IF EXISTS %(schema)s.checkpoint_preprocessor()",
    "DROP FUNCTION IF EXISTS %(schema)s.checkpoint_insert_postprocessor()",
    "DROP FUNCTION IF EXISTS %(schema)s.checkpoint_postprocessor()",
    "DROP FUNCTION IF EXISTS %(schema)s.notify_consumers(text, bigint[])",
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
