"""The hot tables: what can be claimed and what is claimed, beside the main table.

Safe on a live system. One short transaction, begun only when the locks are free, makes the tables
and the triggers; from its commit on every write is projected. Then rows that were there before
are projected in batches, each a transaction. Until that is done consumers that reserve from the
hot tables are given fewer checkpoints than there are, and no wrong ones.

After an interruption `alembic upgrade` begins this revision again, and it finds what is done. To
give up instead, let it finish and then downgrade: until then the database says 0.22.0.

Revision ID: 0.23.0
Revises: 0.22.0
"""

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from alembic import op

revision = "0.23.0"
down_revision = "0.22.0"
branch_labels = None
depends_on = None

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

POSTPROCESSOR = """
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

SUBSCRIPTION_NOTIFIER = """
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

TRIGGERS = (
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

# Until every row is projected: projecting one is no change of it, and leaves its updated_at.
PREPROCESSOR_OF_THE_BACKFILL = PREPROCESSOR.replace(
    "    NEW.updated_at = statement_timestamp();\n",
    "    IF coalesce(current_setting('checkpoints.backfill', true), '') <> 'on' THEN\n"
    "      NEW.updated_at = statement_timestamp();\n"
    "    END IF;\n",
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
      LOCK TABLE %(first)s IN %(mode)s MODE;
      SET LOCAL lock_timeout = '100ms';
      LOCK TABLE %(others)s IN %(mode)s MODE;
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

# The triggers write the hot tables as the role that writes to `checkpoints`, which need not be the
# role that migrates: who may write there may write here, who may read there may read here.
GRANTS = """
DO $$
DECLARE
  granted record;
BEGIN
  FOR granted IN
    SELECT CASE grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END AS role,
           CASE WHEN bool_or(privilege_type IN ('INSERT', 'UPDATE'))
             THEN 'SELECT, INSERT, UPDATE, DELETE'
             ELSE 'SELECT'
           END AS privileges
    FROM (
      SELECT (aclexplode(relacl)).*, relowner AS owner FROM pg_class
      WHERE oid = to_regclass('%(literal)s.checkpoints')
      UNION ALL
      SELECT (aclexplode(attacl)).*, relowner FROM pg_attribute
      JOIN pg_class ON pg_class.oid = attrelid
      WHERE attrelid = to_regclass('%(literal)s.checkpoints')
    ) AS privileges
    WHERE grantee <> owner AND privilege_type IN ('SELECT', 'INSERT', 'UPDATE')
    GROUP BY grantee
  LOOP
    EXECUTE 'GRANT ' || granted.privileges
      || ' ON %(literal)s.checkpoints_ready, %(literal)s.checkpoints_reserved TO ' || granted.role;
  END LOOP;
END $$
"""

# A row is projected by an update of nothing: the trigger does the rest, and mends a row that broke
# the rule before there was one. It must be an update: a transaction of another isolation level that
# began before would not see the new hot rows, and so leave them behind when it moves the row; the
# new version of the row makes it fail instead, to be tried again.
#
# A batch takes the rows that nobody has locked, and so never waits while it holds locks: whatever
# order others lock in, none of them is the victim of a deadlock. What was skipped is waited for at
# the end, one row at a time, two minutes at most.
#
# The isolation level is the role's default otherwise, and every statement needs a new snapshot.
# The subqueries stay index look-ups, however the hot tables grow meanwhile.
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
    SELECT max(id) INTO last_id
    FROM (
      SELECT id FROM %(schema)s.checkpoints WHERE id > after_id ORDER BY id LIMIT 5000
    ) AS batch;
    EXIT WHEN last_id IS NULL;
    SELECT array_agg(id) INTO unprojected
    FROM %(schema)s.checkpoints AS main
    WHERE id > after_id AND id <= last_id
      AND (
        CASE
          WHEN status = 'retry' OR (status = 'active' AND stream_version > stream_position)
            THEN process_at IS NULL
          ELSE status = 'active' AND process_at IS NOT NULL AND reserved_until IS NULL
        END
        OR CASE WHEN reserved_until IS NULL THEN process_at END IS DISTINCT FROM (
          SELECT ready.process_at FROM %(schema)s.checkpoints_ready AS ready
          WHERE ready.id = main.id
        )
        OR reserved_until IS DISTINCT FROM (
          SELECT reserved.reserved_until FROM %(schema)s.checkpoints_reserved AS reserved
          WHERE reserved.id = main.id
        )
      );
    IF unprojected IS NOT NULL THEN
      SELECT coalesce(array_agg(id), '{}') INTO locked
      FROM (
        SELECT id FROM %(schema)s.checkpoints
        WHERE id = ANY (unprojected)
        FOR NO KEY UPDATE SKIP LOCKED
      ) AS candidates;
      PERFORM set_config('checkpoints.backfill', 'on', true);
      UPDATE %(schema)s.checkpoints SET process_at = process_at WHERE id = ANY (locked);
      skipped = skipped || ARRAY(SELECT unnest(unprojected) EXCEPT SELECT unnest(locked));
    END IF;
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

PREPROCESSOR_0_22_0 = """
CREATE OR REPLACE FUNCTION %(schema)s.checkpoint_preprocessor() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
  IF TG_OP = 'UPDATE' THEN
    NEW.updated_at = statement_timestamp();
  END IF;
  IF NEW.status = 'active' AND NEW.stream_version > NEW.stream_position
     AND NEW.process_at IS NULL THEN
    NEW.process_at = statement_timestamp();
    IF NEW.reserved_until IS NULL THEN
      PERFORM pg_notify(TG_TABLE_SCHEMA, subscription_groups.name)
      FROM %(schema)s.subscriptions
      JOIN %(schema)s.subscription_groups
        ON subscription_groups.id = subscriptions.subscription_group_id
      WHERE subscriptions.id = NEW.subscription_id;
    END IF;
  END IF;
  RETURN NEW;
END $$
"""


def execute(statement: str, **context: str) -> None:
    """Run DDL with the schema's name quoted in it."""
    op.execute(sa.DDL(statement, context={"schema": quoted_schema(), **context}))


def quoted_schema() -> str:
    """The schema as SQL. A driver's paramstyle would double each %, as DDL() does."""
    schema = op.get_context().version_table_schema
    return postgresql.dialect(paramstyle="named").identifier_preparer.quote(schema)


def lock(mode: str, first: str, *others: str) -> None:
    """Lock tables until the transaction ends, waiting in short turns.

    The first is the one that every writer locks first.
    """
    schema = quoted_schema()
    execute(
        LOCK,
        mode=mode,
        first=f"{schema}.{first}",
        others=", ".join(f"{schema}.{table}" for table in others),
    )


def create_hot_table(name: str, comment: str, time: sa.Column) -> None:
    """A table of one time for each checkpoint that it holds, indexed by that time."""
    schema = op.get_context().version_table_schema
    op.create_table(
        name,
        sa.Column("id", sa.BigInteger, autoincrement=False, comment="The checkpoint"),
        time,
        sa.PrimaryKeyConstraint("id", name=f"pk_{name}"),
        sa.ForeignKeyConstraint(
            ["id"], [f"{schema}.checkpoints.id"], name=f"fk_{name}_id", ondelete="CASCADE"
        ),
        schema=schema,
        comment=comment,
        if_not_exists=True,
    )
    op.create_index(f"ix_{name}_{time.name}", name, [time.name], schema=schema, if_not_exists=True)


def upgrade() -> None:
    """Make the hot tables, fill them, and have triggers keep them."""
    lock("SHARE ROW EXCLUSIVE", "checkpoints", "subscriptions")
    create_hot_table(
        "checkpoints_ready",
        "Projection of checkpoints, kept by a trigger: what can be claimed",
        sa.Column(
            "process_at",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="Its process_at: from when it may be claimed",
        ),
    )
    create_hot_table(
        "checkpoints_reserved",
        "Projection of checkpoints, kept by a trigger: what is claimed now",
        sa.Column(
            "reserved_until",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="Its reserved_until: when the reservation expires",
        ),
    )
    execute(GRANTS, literal=quoted_schema().replace("'", "''"))
    functions = (PREPROCESSOR_OF_THE_BACKFILL, POSTPROCESSOR, SUBSCRIPTION_NOTIFIER)
    for statement in (*functions, *TRIGGERS):
        execute(statement)
    with op.get_context().autocommit_block():
        execute(BACKFILL)
        execute("ANALYZE %(schema)s.checkpoints_ready, %(schema)s.checkpoints_reserved")
    execute(PREPROCESSOR)


def downgrade() -> None:
    """Drop the hot tables; all they said stands in `checkpoints`."""
    schema = op.get_context().version_table_schema
    lock(
        "ACCESS EXCLUSIVE",
        "checkpoints",
        "subscriptions",
        "checkpoints_ready",
        "checkpoints_reserved",
    )
    execute("DROP TRIGGER checkpoint_postprocessor ON %(schema)s.checkpoints")
    execute("DROP TRIGGER subscription_notifier ON %(schema)s.subscriptions")
    execute("DROP FUNCTION %(schema)s.checkpoint_postprocessor()")
    execute("DROP FUNCTION %(schema)s.subscription_notifier()")
    execute(PREPROCESSOR_0_22_0)
    op.drop_table("checkpoints_reserved", schema=schema)
    op.drop_table("checkpoints_ready", schema=schema)
