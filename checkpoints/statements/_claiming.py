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
    all_,
    func,
    literal_column,
    or_,
    select,
    true,
    tuple_,
    union_all,
)

from checkpoints.statements import _template as template
from checkpoints.tables import checkpoints, subscription_groups, subscriptions

# A group of more has its work looked for at the head of all groups first.
_FEW = 16
# So many rows are looked through there, besides two for each that is wanted: others may hold them.
_AT_HEAD = 32

# Short names, in the text too: psycopg remembers where the parameters of a text of at most 4,096
# characters are, and looks through a longer one each time.
main = checkpoints.alias("main")
subscription = subscriptions.alias("sub")
_group = subscription_groups.alias("owner")

_ONE: ColumnElement[int] = literal_column("1", Integer())


def claim(
    prefix: str,
    due_at: Column[datetime],
    *conditions: ColumnElement[bool],
    is_served: tuple[ColumnElement[bool], ...] = (),
    due_since: ColumnElement[datetime | None] | None = None,
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
        conditions: What the main row, `main`, must be.
        is_served: What a `subscription` of the group must be.
        due_since: What was due before is not looked for; null: all is. With it, a group of many
            subscriptions is looked for at the head first. Without (None), neither.
    """
    due_at = due_at.table.alias("hot").c[due_at.name]
    served = (
        select(subscription.c.id)
        .join(_group, _group.c.id == subscription.c.subscription_group_id)
        .where(_group.c.name == template.string(f"{prefix}_group_name"), *is_served)
        # Once in the text, and planned anew wherever it is named.
        .cte(f"{prefix}_served")
        .prefix_with("NOT MATERIALIZED")
    )
    limit = template.integer(f"{prefix}_limit")
    found: Select[int] | CompoundSelect[int]
    if due_since is None:
        found = _found_by_subscription(due_at, conditions, served, template.LONG_AGO, limit)
    else:
        found = _found_at_head_first(prefix, due_at, conditions, served, due_since, limit)
    either = found.subquery("found")
    return template.materialized(
        select(either.c.id).limit(template.unknown(limit)), f"{prefix}_claimed"
    )


def _found_by_subscription(
    due_at: Column[datetime],
    conditions: tuple[ColumnElement[bool], ...],
    served: CTE,
    since: ColumnElement[datetime],
    limit: ColumnElement[int],
    *only: ColumnElement[bool],
) -> Select[int]:
    """Lock the due rows of the subscription that has the oldest, then of the next."""
    now = template.statement_time()
    oldest = (
        template.oldest_of_subscription(due_at, served.c.id, since=since, until=now)
        .with_only_columns(due_at.label("due_at"))
        .limit(_ONE)
        .lateral("oldest")
    )
    waiting = (
        select(served.c.id)
        .select_from(served.join(oldest, true()))
        .order_by(oldest.c.due_at)
        .subquery("waiting")
    )
    # A limit that is never reached.
    due = (
        template.oldest_of_subscription(due_at, waiting.c.id, since=since, until=now)
        .where(*only)
        .limit(template.unknown(limit + literal_column("1000000", BigInteger())))
        .lateral("due")
    )
    locked = _locked(due, waiting.c.id, conditions)
    return select(locked.c.id).select_from(waiting.join(due, true()).join(locked, true()))


def _found_at_head_first(
    prefix: str,
    due_at: Column[datetime],
    conditions: tuple[ColumnElement[bool], ...],
    served: CTE,
    due_since: ColumnElement[datetime | None],
    limit: ColumnElement[int],
) -> CompoundSelect[int]:
    """Lock those of the group that are among the oldest of all; ask by subscription for more."""
    hot = due_at.table
    counted = (
        select(served.c.id).limit(literal_column(str(_FEW + 1), Integer())).subquery("counted")
    )
    asked = template.materialized(
        select(
            (func.count() > literal_column(str(_FEW), BigInteger())).label("has_many"),
            func.coalesce(due_since, template.LONG_AGO).label("since"),
        ).select_from(counted),
        f"{prefix}_asked",
    )
    has_many = select(asked.c.has_many).scalar_subquery()
    since: ColumnElement[datetime] = select(asked.c.since).scalar_subquery()
    depth = literal_column(str(_AT_HEAD), Integer()) + literal_column("2", Integer()) * limit
    # As rows, which changes nothing: of two bounds on a column, whose values it does not know, the
    # planner expects so few rows that it may read and sort all.
    key = tuple_(due_at, template.ZERO)
    head = template.materialized(
        select(hot.c.id, hot.c.subscription_id)
        .where(
            has_many,
            key >= tuple_(since, template.ZERO),
            key <= tuple_(template.statement_time(), template.ZERO),
        )
        .order_by(due_at)
        .limit(template.unknown(depth)),
        f"{prefix}_head",
    )
    # OFFSET 0: one look-up for each of a few rows, in their order, not a join.
    own = (
        select(served.c.id)
        .where(served.c.id == head.c.subscription_id)
        .offset(literal_column("0", Integer()))
        .lateral("own")
    )
    locked = _locked(head, head.c.subscription_id, conditions)
    at_head = select(locked.c.id).select_from(head.join(own, true()).join(locked, true()))
    # Fewer at the head than were looked for: those were all that is due anywhere.
    is_left = select(func.count() == depth).select_from(head).scalar_subquery()
    # Those at the head were tried already: locked once more they would count twice.
    is_new = due_at.table.c.id != all_(func.array(select(head.c.id).scalar_subquery()))
    by_subscription = _found_by_subscription(due_at, conditions, served, since, limit, is_new)
    return union_all(at_head, by_subscription.where(or_(~has_many, is_left)))


def _locked(
    due: FromClause, subscription_id: ColumnElement[int], conditions: tuple[Any, ...]
) -> FromClause:
    return (
        select(main.c.id)
        .where(main.c.id == due.c.id, main.c.subscription_id == subscription_id, *conditions)
        .with_for_update(of=main, key_share=True, skip_locked=True)
        .lateral("locked")
    )
