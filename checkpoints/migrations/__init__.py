"""The migrations, in an application's own Alembic history or in one of their own.

`upgrade` and `downgrade` run them in a revision of the application; `configure_branch` as a branch
beside its own; `alembic_config` apart from it. `verify` tells at start-up whether the schema is the
one that this code needs.
"""

from checkpoints.migrations.autogenerate import (
    include_name,
    include_object,
    include_type,
    target_metadata,
)
from checkpoints.migrations.branch import configure_branch
from checkpoints.migrations.host import downgrade, upgrade
from checkpoints.migrations.installed import installed_revision, verify
from checkpoints.migrations.rendering import render_revision
from checkpoints.migrations.revisions import alembic_config, head, script_location

__all__ = [
    "alembic_config",
    "configure_branch",
    "downgrade",
    "head",
    "include_name",
    "include_object",
    "include_type",
    "installed_revision",
    "render_revision",
    "script_location",
    "target_metadata",
    "upgrade",
    "verify",
]
