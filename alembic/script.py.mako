"""${message}

Revision ID: ${up_revision}
Revises: ${down_revision | comma,n}
"""

import sqlalchemy as sa

from alembic import op

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    """Say what the database has afterwards."""
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    """Say what the database is again."""
    ${downgrades if downgrades else "pass"}
