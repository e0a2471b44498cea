"""The schema before the hot tables: everything is found by scanning `checkpoints`.

Revision ID: 0.22.0
Revises:
"""

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from alembic import op

revision = "0.22.0"
down_revision = None
# For an application that has these revisions as a branch beside its own.
branch_labels = ("checkpoints",)
depends_on = None

PREPROCESSOR = """
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

TRIGGER = """
CREATE OR REPLACE TRIGGER checkpoint_preprocessor
BEFORE INSERT OR UPDATE ON %(schema)s.checkpoints
FOR EACH ROW EXECUTE FUNCTION %(schema)s.checkpoint_preprocessor()
"""

# Waiting for a table lock makes every later user of the table wait behind it. So it waits for two
# seconds, lets the others pass, and tries again, for about two minutes in all.
LOCK = """
DO $$
DECLARE
  attempts integer = 0;
BEGIN
  LOOP
    BEGIN
      SET LOCAL lock_timeout = '2s';
      LOCK TABLE %(schema)s.checkpoints IN ACCESS EXCLUSIVE MODE;
      SET LOCAL lock_timeout = '100ms';
      LOCK TABLE %(schema)s.subscriptions, %(schema)s.subscription_groups IN ACCESS EXCLUSIVE MODE;
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


def execute(statement: str) -> None:
    """Run DDL with the schema's name quoted in it."""
    schema = op.get_context().version_table_schema
    # A driver's paramstyle would double each %, as DDL() does.
    quoted = postgresql.dialect(paramstyle="named").identifier_preparer.quote(schema)
    op.execute(sa.DDL(statement, context={"schema": quoted}))


def upgrade() -> None:
    """Groups, subscriptions and checkpoints, with the trigger that makes lagging ones due."""
    schema = op.get_context().version_table_schema
    subscription_status = postgresql.ENUM(
        "uninitialized", "active", "paused", "unknown", "replay", "backfill",
        name="subscription_status", schema=schema, create_type=False,
    )  # fmt: skip
    checkpoint_status = postgresql.ENUM(
        "active", "retry", "failed", name="checkpoint_status", schema=schema, create_type=False
    )
    execute(
        "CREATE TYPE %(schema)s.subscription_status AS ENUM "
        "('uninitialized', 'active', 'paused', 'unknown', 'replay', 'backfill')"
    )
    execute("CREATE TYPE %(schema)s.checkpoint_status AS ENUM ('active', 'retry', 'failed')")
    timestamp = sa.DateTime(timezone=True)

    op.create_table(
        "subscription_groups",
        sa.Column("id", sa.BigInteger, sa.Identity(), nullable=False, comment="Key of the group"),
        sa.Column("name", sa.Text, nullable=False, comment="Name that consumers reserve by"),
        sa.PrimaryKeyConstraint("id", name="pk_subscription_groups"),
        sa.UniqueConstraint("name", name="uq_subscription_groups_name"),
        schema=schema,
        comment="Subscriptions that are recorded and consumed together",
    )
    op.create_table(
        "subscriptions",
        sa.Column(
            "id", sa.BigInteger, sa.Identity(), nullable=False, comment="Key of the subscription"
        ),
        sa.Column(
            "subscription_group_id", sa.BigInteger, nullable=False, comment="Group it belongs to"
        ),
        sa.Column("name", sa.Text, nullable=False, comment="Name, unique in the group"),
        sa.Column(
            "status",
            subscription_status,
            nullable=False,
            server_default=sa.text("'uninitialized'"),
            comment="Consumers are given checkpoints of active and replay subscriptions only",
        ),
        sa.Column(
            "replay_target_position",
            sa.BigInteger,
            comment="Global position at which a replay ends; null: no replay",
        ),
        sa.PrimaryKeyConstraint("id", name="pk_subscriptions"),
        sa.UniqueConstraint(
            "subscription_group_id", "name", name="uq_subscriptions_subscription_group_id_name"
        ),
        sa.ForeignKeyConstraint(
            ["subscription_group_id"],
            [f"{schema}.subscription_groups.id"],
            name="fk_subscriptions_subscription_group_id",
        ),
        schema=schema,
        comment="Who follows streams",
    )
    op.create_table(
        "checkpoints",
        sa.Column(
            "id", sa.BigInteger, sa.Identity(), nullable=False, comment="Key of the checkpoint"
        ),
        sa.Column(
            "subscription_id", sa.BigInteger, nullable=False, comment="Subscription that follows"
        ),
        sa.Column("stream_name", sa.Text, nullable=False, comment="Stream that is followed"),
        sa.Column(
            "stream_version",
            sa.BigInteger,
            nullable=False,
            server_default=sa.text("0"),
            comment="Position of the stream's last known message",
        ),
        sa.Column(
            "stream_position",
            sa.BigInteger,
            nullable=False,
            server_default=sa.text("0"),
            comment="Position of the last message processed",
        ),
        sa.Column(
            "status",
            checkpoint_status,
            nullable=False,
            server_default=sa.text("'active'"),
            comment="active, retry or failed",
        ),
        sa.Column(
            "retry_attempts",
            sa.Integer,
            nullable=False,
            server_default=sa.text("0"),
            comment="Attempts that failed since the last success",
        ),
        sa.Column("retries", postgresql.JSONB, comment="Errors of those attempts, oldest first"),
        sa.Column(
            "process_at", timestamp, comment="When there is work to do, and from when; null: none"
        ),
        sa.Column(
            "reserved_until",
            timestamp,
            comment="End of the running reservation, and its token; null: not reserved",
        ),
        sa.Column(
            "lagging",
            sa.Boolean,
            sa.Computed("stream_version > stream_position", persisted=True),
            nullable=False,
            comment="Messages are left to process",
        ),
        sa.Column(
            "created_at",
            timestamp,
            nullable=False,
            server_default=sa.func.now(),
            comment="When the row was made",
        ),
        sa.Column(
            "updated_at",
            timestamp,
            nullable=False,
            server_default=sa.func.now(),
            comment="When the row last changed",
        ),
        sa.PrimaryKeyConstraint("id", name="pk_checkpoints"),
        sa.UniqueConstraint(
            "subscription_id", "stream_name", name="uq_checkpoints_subscription_id_stream_name"
        ),
        sa.ForeignKeyConstraint(
            ["subscription_id"],
            [f"{schema}.subscriptions.id"],
            name="fk_checkpoints_subscription_id",
        ),
        schema=schema,
        comment="How far each subscription has processed each stream: the truth",
    )
    op.create_index(
        "ix_checkpoints_status_lagging_subscription_id",
        "checkpoints",
        ["status", "lagging", "subscription_id"],
        schema=schema,
    )
    op.create_index(
        "ix_checkpoints_claimable",
        "checkpoints",
        ["subscription_id", "process_at"],
        schema=schema,
        postgresql_where=sa.text("process_at IS NOT NULL AND reserved_until IS NULL"),
    )
    op.create_index(
        "ix_checkpoints_reservations",
        "checkpoints",
        ["subscription_id", "reserved_until"],
        schema=schema,
        postgresql_where=sa.text("reserved_until IS NOT NULL"),
    )
    execute(PREPROCESSOR)
    execute(TRIGGER)


def downgrade() -> None:
    """Nothing but the schema, which holds Alembic's version table."""
    schema = op.get_context().version_table_schema
    execute(LOCK)
    op.drop_table("checkpoints", schema=schema)
    op.drop_table("subscriptions", schema=schema)
    op.drop_table("subscription_groups", schema=schema)
    execute("DROP FUNCTION %(schema)s.checkpoint_preprocessor()")
    execute("DROP TYPE %(schema)s.checkpoint_status")
    execute("DROP TYPE %(schema)s.subscription_status")
