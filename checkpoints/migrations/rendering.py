"""The text of an application's revision that runs those of this package."""

from __future__ import annotations

import json

from checkpoints.migrations import revisions
from checkpoints.tables import DEFAULT_SCHEMA

__all__ = ["render_revision", "revision_calls"]

_REVISION = '''"""{message}

Revision ID: {revision}
{revises}
"""

from alembic import op
from checkpoints import migrations

revision = {name}
down_revision = {down_revision}
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Upgrade the tables of checkpoints."""
    {upgrade}


def downgrade() -> None:
    """Downgrade the tables of checkpoints."""
    {downgrade}
'''


def render_revision(
    *,
    from_: str,
    to: str | None = None,
    schema: str = DEFAULT_SCHEMA,
    revision: str,
    down_revision: str | None,
    message: str | None = None,
) -> str:
    """The text of a revision of the application that upgrades the tables; see `upgrade`.

    `to` is None for the newest revision that this installation has. `revision` and `down_revision`
    are the application's own; None: its first.

    Raises:
        TypeError, ValueError: A revision of this package is not known, or `to` is not after
            `from_`.
    """
    calls = revision_calls(from_=from_, to=to, schema=schema)
    message = message or f"checkpoints {to or revisions.head()}"
    return _REVISION.format(
        message=message.replace("\\", "\\\\").replace('"""', '\\"\\"\\"'),
        revision=revision,
        name=_literal(revision),
        revises=f"Revises: {down_revision or ''}".rstrip(),
        down_revision=None if down_revision is None else _literal(down_revision),
        upgrade=calls[0],
        downgrade=calls[1],
    )


def revision_calls(*, from_: str, to: str | None, schema: str) -> tuple[str, str]:
    """The two lines that the application's revision consists of."""
    to = revisions.head() if to is None else to
    names = revisions.known()
    revisions.revision("from_", from_)
    revisions.revision("to", to, least=names[1])
    revisions.schema_name("schema", schema)
    if names.index(to) <= names.index(from_):
        raise ValueError(f"to must be after from_, {from_!r}, not {to!r}")
    low, high, into = (_literal(value) for value in (from_, to, schema))
    return (
        f"migrations.upgrade(op, from_={low}, to={high}, schema={into})",
        f"migrations.downgrade(op, from_={high}, to={low}, schema={into})",
    )


def _literal(value: str) -> str:
    """A text in Python, with double quotes as formatters have it."""
    return json.dumps(value, ensure_ascii=False)
