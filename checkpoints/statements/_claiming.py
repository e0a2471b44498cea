"""How due checkpoints are found and locked: what reserve and recover have in common."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import CTE, Column, ColumnElement, select, true

from checkpoints.statements import _template as template
from checkpoints.tables import checkpoints, subscription_groups, subscriptions


def claim(prefix: str, due_at: Column[datetime], *conditions: ColumnElement[bool]) -> CTE:
    """Lock checkpoints of a group that are due in a hot table, the oldest first, waiting for none.

    The due rows come in order, and each is looked up and locked before the next: a join in one
    step may be planned as one over all rows at hand, or sorted only after all of them are locked.
    Only the main row is locked, which guards the checkpoint: a hot row locked beside it would stay
    locked when the main row is passed over, and its holder would wait for this transaction.
    `conditions` ask the main row again: when another transaction changed it meanwhile, PostgreSQL
    checks them once more on what it became. Never without OF: that would lock the group and the
    subscription, and hold up all other consumers.
    """
    hot = due_at.table
    due = (
        select(hot.c.id, due_at)
        .where(due_at <= template.statement_time())
        .order_by(due_at)
        .subquery("due")
    )
    locked = (
        select(checkpoints.c.id)
        .join(subscriptions, subscriptions.c.id == checkpoints.c.subscription_id)
        .join(
            subscription_groups, subscription_groups.c.id == subscriptions.c.subscription_group_id
        )
        .where(
            checkpoints.c.id == due.c.id,
            subscription_groups.c.name == template.string(f"{prefix}_group_name"),
            *conditions,
        )
        .with_for_update(of=checkpoints, key_share=True, skip_locked=True)
        .lateral("locked")
    )
    return template.materialized(
        select(locked.c.id)
        .select_from(due.join(locked, true()))
        .limit(template.integer(f"{prefix}_limit")),
        f"{prefix}_claimed",
    )
