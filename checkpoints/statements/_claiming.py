"""How due checkpoints are found and locked: what reserve and recover have in common.

Each subscription of a group is asked for its oldest due row, and the one that has the oldest is
served first: what is due in other groups and in paused subscriptions is never read. Asking costs a
microsecond for each subscription, so for a group of many the oldest rows of all groups are looked
through before, a bounded number of them.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    CTE,
    BigInteger,
    Column,
    ColumnElement,
    CompoundSelect,
    FromClause,
    Integer,
    Select,
    func,
    literal_column,
    or_,
    select,
    true,
    union_all,
)

from checkpoints.statements import _template as template
from checkpoints.tables import checkpoints, subscription_groups, subscriptions

# A group of more has its work looked for at the head of all groups first.
_FEW = 16
# So many rows are looked through there, besides two for each that is wanted: others may hold them.
_AT_HEAD = 32

_ONE: ColumnElement[int] = literal_column("1", Integer())


def claim(
    prefix: str,
    due_at: Column[datetime],
    *conditions: ColumnElement[bool],
    is_served: tuple[ColumnElement[bool], ...] = (),
    since: ColumnElement[datetime] = template.LONG_AGO,
    looks_at_head: bool = False,
) -> CTE:
    """Lock checkpoints of a group that are due in a hot table, the oldest first, waiting for none.

    Due rows come in order, and each is looked up and locked before the next: a join in one step may
    be planned as one over all rows at hand, or sorted only after all of them are locked.

    Only the main row is locked, which guards the checkpoint: a hot row locked beside it would stay
    locked when the main row is passed over, and its holder would wait for this transaction.
    `conditions` ask the main row again: when another transaction changed it meanwhile, PostgreSQL
    checks them once more on what it became. Never without OF: that would lock the group and the
    subscription, and hold up all other consumers.

    Args:
        prefix: What the names of parameters and CTEs begin with.
        due_at: The hot table's time.
        conditions: What the main row must be.
        is_served: What a subscription of the group must be.
        since: What was due before is not looked for.
        looks_at_head: Whether a group of many subscriptions is looked for at the head first.
    """
    served = (
        select(subscriptions.c.id)
        .join(
            subscription_groups, subscription_groups.c.id == subscriptions.c.subscription_group_id
        )
        .where(subscription_groups.c.name == template.string(f"{prefix}_group_name"), *is_served)
    )
    limit = template.integer(f"{prefix}_limit")
    found: Select[int] | CompoundSelect[int]
    if looks_at_head:
        found = _found_at_head_first(prefix, due_at, conditions, served, since, limit)
    else:
        found = _found_by_subscription(due_at, conditions, served, since, limit)
    either = found.subquery("found")
    return template.materialized(select(either.c.id).limit(limit), f"{prefix}_claimed")


def _found_by_subscription(
    due_at: Column[datetime],
    conditions: tuple[ColumnElement[bool], ...],
    served: Select[int],
    since: ColumnElement[datetime],
    limit: ColumnElement[int],
) -> Select[int]:
    """Lock the due rows of the subscription that has the oldest, then of the next."""
    now = template.statement_time()
    asked = served.subquery("served")
    oldest = (
        template.oldest_of_subscription(due_at, asked.c.id, since=since, until=now)
        .with_only_columns(due_at.label("due_at"))
        .limit(_ONE)
        .lateral("oldest")
    )
    waiting = (
        select(asked.c.id)
        .select_from(asked.join(oldest, true()))
        .order_by(oldest.c.due_at)
        .subquery("waiting")
    )
    # A limit that is never reached, and that the planner cannot know, has it plan for the first
    # rows: else it may read and sort all.
    due = (
        template.oldest_of_subscription(due_at, waiting.c.id, since=since, until=now)
        .limit(limit + literal_column("1000000", BigInteger()))
        .lateral("due")
    )
    locked = _locked(due, waiting.c.id, conditions)
    return select(locked.c.id).select_from(waiting.join(due, true()).join(locked, true()))


def _found_at_head_first(
    prefix: str,
    due_at: Column[datetime],
    conditions: tuple[ColumnElement[bool], ...],
    served: Select[int],
    since: ColumnElement[datetime],
    limit: ColumnElement[int],
) -> CompoundSelect[int]:
    """Lock those of the group that are among the oldest of all; ask by subscription for more."""
    hot = due_at.table
    counted = served.limit(literal_column(str(_FEW + 1), Integer())).subquery("counted")
    size = template.materialized(
        select(
            (func.count() > literal_column(str(_FEW), BigInteger())).label("has_many")
        ).select_from(counted),
        f"{prefix}_size",
    )
    has_many = select(size.c.has_many).scalar_subquery()
    depth = literal_column(str(_AT_HEAD), Integer()) + literal_column("2", Integer()) * limit
    head = template.materialized(
        select(hot.c.id, hot.c.subscription_id)
        .where(has_many, due_at >= since, due_at <= template.statement_time())
        .order_by(due_at)
        .limit(depth),
        f"{prefix}_head",
    )
    # OFFSET 0: one look-up for each of a few rows, in their order, not a join.
    own = (
        served.where(subscriptions.c.id == head.c.subscription_id)
        .offset(literal_column("0", Integer()))
        .lateral("own")
    )
    locked = _locked(head, head.c.subscription_id, conditions)
    at_head = select(locked.c.id).select_from(head.join(own, true()).join(locked, true()))
    # Fewer at the head than were looked for: those were all that is due anywhere.
    is_left = select(func.count() == depth).select_from(head).scalar_subquery()
    by_subscription = _found_by_subscription(due_at, conditions, served, since, limit)
    return union_all(at_head, by_subscription.where(or_(~has_many, is_left)))


def _locked(
    due: FromClause, subscription_id: ColumnElement[int], conditions: tuple[Any, ...]
) -> FromClause:
    return (
        select(checkpoints.c.id)
        .where(
            checkpoints.c.id == due.c.id,
            checkpoints.c.subscription_id == subscription_id,
            *conditions,
        )
        .with_for_update(of=checkpoints, key_share=True, skip_locked=True)
        .lateral("locked")
    )
