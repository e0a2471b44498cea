"""The packaged revisions as a branch beside an application's own."""

from __future__ import annotations

from collections.abc import Callable

import alembic.op
from alembic.script import Script

from checkpoints.errors import MigrationRefused
from checkpoints.migrations import revisions
from checkpoints.migrations.running import Op, prepared, run
from checkpoints.tables import DEFAULT_SCHEMA

__all__ = ["configure_branch"]


def configure_branch(context: Op, *, schema: str = DEFAULT_SCHEMA) -> None:
    """Have the packaged revisions run as a branch of the application's own environment.

    For an env.py, after `context.configure()`, where alembic.ini names the packaged revisions in
    `version_locations`. `context` is `alembic.context`. The revisions then run in `schema`,
    whatever `version_table_schema` is, and record what they did for `verify`. Prefer `upgrade` in a
    revision of the application: with a branch, `upgrade head` must become `upgrade heads`.

    Raises:
        MigrationRefused: The packaged revisions are not among the application's, most often since
            `path_separator = os` splits `checkpoints:alembic/versions` at the colon.
    """
    revisions.schema_name("schema", schema)
    directory = context.get_context().script
    found = [] if directory is None else list(directory.walk_revisions())
    by_name = {script.revision: script for script in found}
    for packaged in revisions.scripts():
        script = by_name.get(packaged.revision)
        if script is None:
            raise MigrationRefused(
                f"revision {packaged.revision} of checkpoints is not among the revisions of this "
                "environment: name checkpoints:alembic/versions in version_locations, and set "
                "path_separator = newline in alembic.ini (`os` splits it at the colon)"
            )
        for up in (True, False):
            _wrap(script, up=up, schema=schema)


def _wrap(script: Script, *, up: bool, schema: str) -> None:
    """Have a revision of the branch run as `upgrade` and `downgrade` run it."""
    names = revisions.known()
    index = names.index(script.revision)
    before, after = (names[index - 1], names[index]) if up else (names[index], names[index - 1])
    name = "upgrade" if up else "downgrade"
    function: Callable[[], None] = getattr(script.module, name)

    def wrapped() -> None:
        context = alembic.op.get_context()
        with prepared(context, schema):
            run(
                context,
                function,
                revision=script.revision,
                before=before,
                after=after,
                schema=schema,
            )

    wrapped.__name__ = name
    setattr(script.module, name, wrapped)
