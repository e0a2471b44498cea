"""The subscription in the hot tables, and triggers that run once for a statement.

A reservation then reads what is due in the subscriptions that it serves, and nothing of other
groups or of paused subscriptions. The main table loses the indexes that the hot tables have made
needless, and that kept its updates from being HOT ones.

Safe on a live system, also for an application of 0.23.0 that goes on running. One short
transaction, begun only when the locks are free, adds the columns and changes the triggers; from its
commit on every hot row that is written has its subscription. Those that were there before are
written anew in batches, each a transaction. Indexes are built and dropped concurrently.

After an interruption `alembic upgrade` begins this revision again, and it finds what is done. To
give up instead, let it finish and then downgrade: until then the database says 0.23.0.

Revision ID: 0.24.0
Revises: 0.23.0
"""

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from alembic import op

revision = "0.24.0"
down_revision = "0.23.0"
branch_labels = None
depends_on = None

NOTIFY_CONSUMERS = """
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
GRANT_NOTIFY_CONSUMERS = """
GRANT EXECUTE ON FUNCTION %(schema)s.notify_consumers(text, bigint[]) TO PUBLIC
"""

PREPROCESSOR = """
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

# Until every hot row has its subscription: writing one anew is no change of the checkpoint.
PREPROCESSOR_OF_THE_BACKFILL = PREPROCESSOR.replace(
    "    NEW.updated_at = statement_timestamp();\n",
    "    IF coalesce(current_setting('checkpoints.backfill', true), '') <> 'on' THEN\n"
    "      NEW.updated_at = statement_timestamp();\n"
    "    END IF;\n",
)

INSERT_POSTPROCESSOR = """
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

POSTPROCESSOR = """
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

TRIGGERS = (
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
)

# Waiting for a table lock makes every later writer wait behind it. So it waits for two seconds,
# lets the others pass, and tries again, for about two minutes in all. It waits only for the first
# table, and holds nothing then: with one table locked, a wait for the next could close a circle
# with a transaction that has the next and wants the first, and end in a deadlock of a second.
LOCK = """
DO $$
DECLARE
  attempts integer = 0;
BEGIN
  LOOP
    BEGIN
      SET LOCAL lock_timeout = '2s';
      LOCK TABLE %(first)s;
      SET LOCAL lock_timeout = '100ms';
      %(others)s;
      EXIT;
    EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
      attempts = attempts + 1;
      IF attempts >= 40 THEN
        RAISE;
      END IF;
      PERFORM pg_sleep(1);
    END;
  END LOOP;
END $$
"""

# A hot row gets its subscription by an update of nothing of its main row: the trigger does it.
# Not by an update of the hot row, for the lock on the main row guards both; and a transaction of
# another isolation level that began before must fail when it moves a row that was changed here.
#
# A batch takes the rows that nobody has locked, and so never waits while it holds locks: whatever
# order others lock in, none of them is the victim of a deadlock. What was skipped is waited for at
# the end, one row at a time, two minutes at most.
#
# The isolation level is the role's default otherwise, and every statement needs a new snapshot.
BACKFILL = """
DO $$
DECLARE
  after_id bigint = -9223372036854775808;
  last_id bigint;
  unprojected bigint[];
  locked bigint[];
  skipped bigint[] = '{}';
  skipped_id bigint;
  attempts integer;
BEGIN
  LOOP
    COMMIT;
    SET TRANSACTION ISOLATION LEVEL READ COMMITTED;
    SELECT max(id), array_agg(id) INTO last_id, unprojected
    FROM (
      SELECT id
      FROM (
        (SELECT id FROM %(schema)s.checkpoints_ready
         WHERE id > after_id AND subscription_id IS NULL ORDER BY id LIMIT 5000)
        UNION ALL
        (SELECT id FROM %(schema)s.checkpoints_reserved
         WHERE id > after_id AND subscription_id IS NULL ORDER BY id LIMIT 5000)
      ) AS either
      ORDER BY id LIMIT 5000
    ) AS batch;
    EXIT WHEN last_id IS NULL;
    SELECT coalesce(array_agg(id), '{}') INTO locked
    FROM (
      SELECT id FROM %(schema)s.checkpoints
      WHERE id = ANY (unprojected)
      FOR NO KEY UPDATE SKIP LOCKED
    ) AS candidates;
    PERFORM set_config('checkpoints.backfill', 'on', true);
    UPDATE %(schema)s.checkpoints SET process_at = process_at WHERE id = ANY (locked);
    skipped = skipped || ARRAY(SELECT unnest(unprojected) EXCEPT SELECT unnest(locked));
    after_id = last_id;
  END LOOP;

  FOREACH skipped_id IN ARRAY skipped LOOP
    attempts = 0;
    LOOP
      COMMIT;
      SET TRANSACTION ISOLATION LEVEL READ COMMITTED;
      BEGIN
        SET LOCAL lock_timeout = '2s';
        PERFORM set_config('checkpoints.backfill', 'on', true);
        UPDATE %(schema)s.checkpoints SET process_at = process_at WHERE id = skipped_id;
        EXIT;
      EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
        attempts = attempts + 1;
        IF attempts >= 60 THEN
          RAISE;
        END IF;
      END;
    END LOOP;
  END LOOP;
END $$
"""

POSTPROCESSOR_0_23_0 = """
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

TRIGGERS_0_23_0 = (
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
)

NEW_TRIGGERS = (
    "DROP TRIGGER checkpoint_insert_preprocessor ON %(schema)s.checkpoints",
    "DROP TRIGGER checkpoint_insert_postprocessor ON %(schema)s.checkpoints",
    "DROP FUNCTION %(schema)s.checkpoint_insert_postprocessor()",
    "DROP FUNCTION %(schema)s.notify_consumers(text, bigint[])",
)

# What is done concurrently waits for the transactions that are older, however long they take:
# nobody waits behind it. And it need not say that an index is not there.
PATIENT = "SET lock_timeout = 0; SET client_min_messages = warning"
IMPATIENT = "SET lock_timeout = '2s'; RESET client_min_messages"

HOT_TABLES = ("checkpoints_ready", "checkpoints_reserved")

# Room on each page of the main table for the next version of a row; the narrow tables of
# short-lived rows are vacuumed by the number of dead rows, at full speed, and never made shorter,
# which would lock them.
STORAGE = (
    """
ALTER TABLE %(schema)s.checkpoints
SET (fillfactor = 85, autovacuum_vacuum_scale_factor = 0.05)
""",
    *(
        f"""
ALTER TABLE %(schema)s.{table}
SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000,
     autovacuum_vacuum_cost_delay = 0, vacuum_truncate = false)
"""
        for table in HOT_TABLES
    ),
)

STORAGE_0_23_0 = (
    "ALTER TABLE %(schema)s.checkpoints RESET (fillfactor, autovacuum_vacuum_scale_factor)",
    *(
        f"ALTER TABLE %(schema)s.{table} RESET (autovacuum_vacuum_scale_factor, "
        "autovacuum_vacuum_threshold, autovacuum_vacuum_cost_delay, vacuum_truncate)"
        for table in HOT_TABLES
    ),
)

# name: table, columns, condition
INDEXES = {
    "ix_checkpoints_ready_subscription_id_process_at": (
        "checkpoints_ready",
        ["subscription_id", "process_at"],
        None,
    ),
    "ix_checkpoints_reserved_subscription_id_reserved_until": (
        "checkpoints_reserved",
        ["subscription_id", "reserved_until"],
        None,
    ),
    "ix_checkpoints_status_subscription_id": (
        "checkpoints",
        ["status", "subscription_id"],
        "status <> 'active'",
    ),
}

INDEXES_0_23_0 = {
    "ix_checkpoints_status_lagging_subscription_id": (
        "checkpoints",
        ["status", "lagging", "subscription_id"],
        None,
    ),
    "ix_checkpoints_claimable": (
        "checkpoints",
        ["subscription_id", "process_at"],
        "process_at IS NOT NULL AND reserved_until IS NULL",
    ),
    "ix_checkpoints_reservations": (
        "checkpoints",
        ["subscription_id", "reserved_until"],
        "reserved_until IS NOT NULL",
    ),
    "ix_checkpoints_reserved_reserved_until": ("checkpoints_reserved", ["reserved_until"], None),
}


def execute(statement: str, **context: str) -> None:
    """Run DDL with the schema's name quoted in it."""
    op.execute(sa.DDL(statement, context={"schema": quoted_schema(), **context}))


def quoted_schema() -> str:
    """The schema as SQL. A driver's paramstyle would double each %, as DDL() does."""
    schema = op.get_context().version_table_schema
    return postgresql.dialect(paramstyle="named").identifier_preparer.quote(schema)


def lock(mode: str, first: str, *others: str) -> None:
    """Lock tables until the transaction ends, waiting in short turns.

    The first is the one that every writer locks first; the others are locked from readers, too.
    """
    schema = quoted_schema()
    execute(
        LOCK,
        first=f"{schema}.{first} IN {mode} MODE",
        others="; ".join(
            f"LOCK TABLE {schema}.{table} IN ACCESS EXCLUSIVE MODE" for table in others
        ),
    )


def create_indexes(indexes: dict[str, tuple[str, list[str], str | None]]) -> None:
    """Build them without a lock that holds up writers; one left half built is built anew."""
    schema = op.get_context().version_table_schema
    for name, (table, columns, condition) in indexes.items():
        drop_index(name)
        op.create_index(
            name,
            table,
            columns,
            schema=schema,
            postgresql_concurrently=True,
            postgresql_where=None if condition is None else sa.text(condition),
        )


def drop_index(name: str) -> None:
    """Drop it, if it is there, without a lock that holds up others."""
    schema = op.get_context().version_table_schema
    op.drop_index(name, schema=schema, postgresql_concurrently=True, if_exists=True)


def upgrade() -> None:
    """Give the hot rows their subscription, and have triggers do so."""
    schema = op.get_context().version_table_schema
    lock("SHARE ROW EXCLUSIVE", "checkpoints", *HOT_TABLES)
    for table in HOT_TABLES:
        op.add_column(
            table,
            sa.Column("subscription_id", sa.BigInteger, comment="Its subscription"),
            schema=schema,
            if_not_exists=True,
        )
    functions = (
        NOTIFY_CONSUMERS,
        GRANT_NOTIFY_CONSUMERS,
        PREPROCESSOR_OF_THE_BACKFILL,
        INSERT_POSTPROCESSOR,
        POSTPROCESSOR,
    )
    for statement in (*functions, *TRIGGERS, *STORAGE):
        execute(statement)
    with op.get_context().autocommit_block():
        execute(BACKFILL)
        execute(PATIENT)
        create_indexes(INDEXES)
        for name in INDEXES_0_23_0:
            drop_index(name)
        execute(IMPATIENT)
        execute("ANALYZE %(schema)s.checkpoints_ready, %(schema)s.checkpoints_reserved")
    lock("SHARE ROW EXCLUSIVE", "checkpoints", *HOT_TABLES)
    for table in HOT_TABLES:
        op.alter_column(table, "subscription_id", nullable=False, schema=schema)
    execute(PREPROCESSOR)


def downgrade() -> None:
    """Build the old indexes, then drop the columns and have the old triggers back."""
    schema = op.get_context().version_table_schema
    with op.get_context().autocommit_block():
        execute(PATIENT)
        create_indexes(INDEXES_0_23_0)
        drop_index("ix_checkpoints_status_subscription_id")
        execute(IMPATIENT)
    lock("ACCESS EXCLUSIVE", "checkpoints", *HOT_TABLES)
    for statement in (POSTPROCESSOR_0_23_0, *TRIGGERS_0_23_0, *NEW_TRIGGERS, *STORAGE_0_23_0):
        execute(statement)
    for table in HOT_TABLES:
        op.drop_column(table, "subscription_id", schema=schema)
