"""What operators look at and act with.

Lists start from the hot tables or an index, never from a scan of the main table, and count at
most `TOTAL_LIMIT` results. Reads lock nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from functools import cache
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    FromClause,
    Select,
    any_,
    func,
    literal_column,
    null,
    or_,
    select,
    union_all,
)

from checkpoints import _arguments as arguments
from checkpoints.records import CheckpointStatus, JSONValue, SubscriptionStatus
from checkpoints.statements import _template as template
from checkpoints.tables import (
    checkpoints,
    checkpoints_ready,
    checkpoints_reserved,
    subscription_groups,
    subscriptions,
)

__all__ = [
    "TOTAL_LIMIT",
    "get_checkpoint",
    "get_metrics",
    "list_failed",
    "list_lagging",
    "list_reservations",
    "list_retries",
    "schedule_checkpoints",
    "skip_checkpoints",
]

TOTAL_LIMIT = 10_000
"""How far lists count: a `total_results` of this number means so many or more."""

ListedSelect = Select[
    int,
    str,
    str,
    str,
    int,
    int,
    CheckpointStatus,
    int,
    list[JSONValue] | None,
    datetime | None,
    datetime | None,
    datetime,
    int,
]


def list_reservations(
    *, search: str | None = None, offset: int = 0, limit: int = 25
) -> Select[int, str, str, str, int, datetime, int]:
    """Checkpoints that are reserved now, expired ones included, the next to expire first.

    `search` is looked for in the names of group, subscription and stream, whatever its case, every
    character standing for itself (None or empty: all).

    Rows: id, group_name, name (of the subscription), stream_name, stream_position, reserved_until,
    total_results (of all pages, at most `TOTAL_LIMIT`).
    """
    return _list_reservations().params(_page("reservations", search, offset, limit))


def list_lagging(*, search: str | None = None, offset: int = 0, limit: int = 25) -> ListedSelect:
    """Active checkpoints with messages left to process, those due longest first.

    Those that wait for a retry or have failed stand in lists of their own. `search`, `offset`,
    `limit` and total_results are as of `list_reservations`; the other columns are those of
    `list_failed`.
    """
    return _list_lagging().params(_page("lagging", search, offset, limit))


def list_retries(*, search: str | None = None, offset: int = 0, limit: int = 25) -> ListedSelect:
    """Checkpoints that failed and wait for another attempt, the next one first.

    `search`, `offset`, `limit` and total_results are as of `list_reservations`; the other columns
    are those of `list_failed`.
    """
    return _list_retries().params(_page("retries", search, offset, limit))


def list_failed(*, search: str | None = None, offset: int = 0, limit: int = 25) -> ListedSelect:
    """Checkpoints that were given up, the last to fail first.

    `search`, `offset`, `limit` and total_results are as of `list_reservations`.

    Rows: id, group_name, name (of the subscription), stream_name, stream_version, stream_position,
    status, retry_attempts, retries (the errors, oldest first; None: none), process_at,
    reserved_until, updated_at, total_results.
    """
    return _list_failed().params(_page("failed", search, offset, limit))


def _page(prefix: str, search: str | None, offset: int, limit: int) -> dict[str, Any]:
    pattern = "%"
    if search is not None:
        escaped = arguments.text("search", search)
        for special in ("\\", "%", "_"):
            escaped = escaped.replace(special, "\\" + special)
        pattern = f"%{escaped}%"
    return {
        f"{prefix}_pattern": pattern,
        f"{prefix}_offset": arguments.offset("offset", offset),
        f"{prefix}_limit": arguments.limit("limit", limit),
    }


def _listed(
    prefix: str,
    columns: tuple[ColumnElement[Any], ...],
    source: FromClause,
    *order: ColumnElement[Any],
    where: ColumnElement[bool] | None = None,
) -> Select[*tuple[Any, ...]]:
    """A page of the checkpoints in `source`, with their names, and how many match in all."""
    pattern = template.string(f"{prefix}_pattern")
    matching = (
        select(
            checkpoints.c.id,
            subscription_groups.c.name.label("group_name"),
            subscriptions.c.name.label("name"),
            checkpoints.c.stream_name,
            *columns,
        )
        .select_from(source)
        .join(subscriptions, subscriptions.c.id == checkpoints.c.subscription_id)
        .join(
            subscription_groups, subscription_groups.c.id == subscriptions.c.subscription_group_id
        )
        .where(
            or_(
                *(
                    column.ilike(pattern, escape="\\")
                    for column in (
                        subscription_groups.c.name,
                        subscriptions.c.name,
                        checkpoints.c.stream_name,
                    )
                )
            )
        )
    )
    if where is not None:
        matching = matching.where(where)
    counted = matching.with_only_columns(checkpoints.c.id).limit(
        literal_column(str(TOTAL_LIMIT), BigInteger())
    )
    total = select(func.count()).select_from(counted.subquery("counted")).scalar_subquery()
    return (
        matching.add_columns(total.label("total_results"))
        .order_by(*order, checkpoints.c.id)
        .offset(template.bigint(f"{prefix}_offset"))
        .limit(template.integer(f"{prefix}_limit"))
    )


@cache
def _list_reservations() -> Select[int, str, str, str, int, datetime, int]:
    return _listed(
        "reservations",
        (checkpoints.c.stream_position, checkpoints.c.reserved_until),
        checkpoints_reserved.join(checkpoints, checkpoints.c.id == checkpoints_reserved.c.id),
        checkpoints_reserved.c.reserved_until,
    )


_LISTED_COLUMNS = (
    checkpoints.c.stream_version,
    checkpoints.c.stream_position,
    checkpoints.c.status,
    checkpoints.c.retry_attempts,
    checkpoints.c.retries,
    checkpoints.c.process_at,
    checkpoints.c.reserved_until,
    checkpoints.c.updated_at,
)


@cache
def _list_lagging() -> ListedSelect:
    # All that lags is in one of the hot tables, and the ready ones come sorted from their index.
    reserved = select(checkpoints_reserved.c.id, checkpoints.c.process_at).join(
        checkpoints, checkpoints.c.id == checkpoints_reserved.c.id
    )
    hot = union_all(
        select(checkpoints_ready.c.id, checkpoints_ready.c.process_at), reserved
    ).subquery("hot")
    return _listed(
        "lagging",
        _LISTED_COLUMNS,
        hot.join(checkpoints, checkpoints.c.id == hot.c.id),
        hot.c.process_at,
        where=(checkpoints.c.stream_version > checkpoints.c.stream_position)
        & (checkpoints.c.status == template.ACTIVE),
    )


@cache
def _list_retries() -> ListedSelect:
    return _listed(
        "retries",
        _LISTED_COLUMNS,
        checkpoints,
        checkpoints.c.process_at,
        where=checkpoints.c.status == template.RETRY,
    )


@cache
def _list_failed() -> ListedSelect:
    return _listed(
        "failed",
        _LISTED_COLUMNS,
        checkpoints,
        checkpoints.c.updated_at.desc(),
        where=checkpoints.c.status == template.FAILED,
    )


def get_checkpoint(
    id: int,
) -> Select[
    int,
    int,
    str,
    str,
    SubscriptionStatus,
    str,
    int,
    int,
    CheckpointStatus,
    int,
    list[JSONValue] | None,
    datetime | None,
    datetime | None,
    datetime,
    datetime,
]:
    """All of one checkpoint.

    Rows: id, subscription_id, group_name, name (of the subscription), subscription_status,
    stream_name, stream_version, stream_position, status, retry_attempts, retries, process_at,
    reserved_until, created_at, updated_at. No row: there is no such checkpoint.
    """
    return _get_checkpoint().params(get_checkpoint_id=arguments.identifier("id", id))


@cache
def _get_checkpoint() -> Select[*tuple[Any, ...]]:
    return (
        select(
            checkpoints.c.id,
            checkpoints.c.subscription_id,
            subscription_groups.c.name.label("group_name"),
            subscriptions.c.name.label("name"),
            subscriptions.c.status.label("subscription_status"),
            checkpoints.c.stream_name,
            checkpoints.c.stream_version,
            checkpoints.c.stream_position,
            checkpoints.c.status,
            checkpoints.c.retry_attempts,
            checkpoints.c.retries,
            checkpoints.c.process_at,
            checkpoints.c.reserved_until,
            checkpoints.c.created_at,
            checkpoints.c.updated_at,
        )
        .join(subscriptions, subscriptions.c.id == checkpoints.c.subscription_id)
        .join(
            subscription_groups, subscription_groups.c.id == subscriptions.c.subscription_group_id
        )
        .where(checkpoints.c.id == template.bigint("get_checkpoint_id"))
    )


@cache
def get_metrics() -> Select[
    int, str, str, SubscriptionStatus, int, int, int, int, int, int, int, datetime | None
]:
    """What is at hand for each subscription, by group and name. It costs as much as is at hand.

    Rows: id (of the subscription), group_name, name, status, ready (checkpoints that can be
    claimed, now or later), due (now), reserved, expired (reserved until a time that is past),
    retry, failed, lag (messages left in ready and reserved checkpoints), oldest_due_at (None:
    nothing is due).
    """
    due = checkpoints_ready.c.process_at <= template.statement_time()
    expired = checkpoints_reserved.c.reserved_until <= template.statement_time()
    lag = func.sum(
        func.greatest(checkpoints.c.stream_version - checkpoints.c.stream_position, template.ZERO)
    )
    ready = (
        select(
            checkpoints.c.subscription_id,
            func.count().label("ready"),
            func.count().filter(due).label("due"),
            lag.label("lag"),
            func.min(checkpoints_ready.c.process_at).filter(due).label("oldest_due_at"),
        )
        .join_from(checkpoints_ready, checkpoints, checkpoints.c.id == checkpoints_ready.c.id)
        .group_by(checkpoints.c.subscription_id)
        .cte("ready_counts")
    )
    reserved = (
        select(
            checkpoints.c.subscription_id,
            func.count().label("reserved"),
            func.count().filter(expired).label("expired"),
            lag.label("lag"),
        )
        .join_from(checkpoints_reserved, checkpoints, checkpoints.c.id == checkpoints_reserved.c.id)
        .group_by(checkpoints.c.subscription_id)
        .cte("reserved_counts")
    )
    troubled = (
        select(
            checkpoints.c.subscription_id,
            func.count().filter(checkpoints.c.status == template.RETRY).label("retry"),
            func.count().filter(checkpoints.c.status == template.FAILED).label("failed"),
        )
        .where(checkpoints.c.status.in_([template.RETRY, template.FAILED]))
        .group_by(checkpoints.c.subscription_id)
        .cte("troubled_counts")
    )

    def count(*columns: ColumnElement[Any]) -> ColumnElement[int]:
        total: ColumnElement[Any] = template.ZERO
        for column in columns:
            total = total + func.coalesce(column, template.ZERO)
        return total.cast(BigInteger)

    return (
        select(
            subscriptions.c.id,
            subscription_groups.c.name.label("group_name"),
            subscriptions.c.name,
            subscriptions.c.status,
            count(ready.c.ready).label("ready"),
            count(ready.c.due).label("due"),
            count(reserved.c.reserved).label("reserved"),
            count(reserved.c.expired).label("expired"),
            count(troubled.c.retry).label("retry"),
            count(troubled.c.failed).label("failed"),
            count(ready.c.lag, reserved.c.lag).label("lag"),
            ready.c.oldest_due_at,
        )
        .join(
            subscription_groups, subscription_groups.c.id == subscriptions.c.subscription_group_id
        )
        .outerjoin(ready, ready.c.subscription_id == subscriptions.c.id)
        .outerjoin(reserved, reserved.c.subscription_id == subscriptions.c.id)
        .outerjoin(troubled, troubled.c.subscription_id == subscriptions.c.id)
        .order_by(subscription_groups.c.name, subscriptions.c.name)
    )


def skip_checkpoints(ids: Iterable[int]) -> Select[int]:
    """Move checkpoints past the message they stand at: position + 1, not past the version.

    Status active, attempts and errors cleared; a running reservation is ended, and its holder
    finds its token gone. One that still lags is ready again.

    Rows: id of each that changed; none for one that had nothing to skip and nothing to clear.
    Locks them in the common order and waits.
    """
    return _skip().params(skip_ids=arguments.identifiers("ids", ids))


@cache
def _skip() -> Select[int]:
    skippable = template.materialized(
        select(checkpoints.c.id)
        .where(
            checkpoints.c.id == any_(template.bigints("skip_ids")),
            or_(
                checkpoints.c.stream_version > checkpoints.c.stream_position,
                checkpoints.c.reserved_until.is_not(None),
                checkpoints.c.status != template.ACTIVE,
            ),
        )
        .order_by(checkpoints.c.subscription_id, checkpoints.c.stream_name)
        .with_for_update(of=checkpoints, key_share=True),
        "skippable",
    )
    skipped = (
        template.update_checkpoints()
        .where(template.is_one_of(skippable))
        .values(
            stream_position=func.greatest(
                checkpoints.c.stream_position,
                func.least(
                    checkpoints.c.stream_position + literal_column("1", BigInteger()),
                    checkpoints.c.stream_version,
                ),
            ),
            process_at=null(),
            reserved_until=null(),
            **template.succeeded(),
        )
        .returning(checkpoints.c.id)
        .cte("skipped")
    )
    return select(skipped.c.id)


def schedule_checkpoints(ids: Iterable[int], process_at: datetime | timedelta) -> Select[int]:
    """Have checkpoints processed at a time, earlier or later than they would be.

    `process_at` may be a timedelta: so long from now, by the database's clock.

    For those that are not reserved and have work: active ones that lag, retries and failed ones.
    The status is kept: a failed one is claimed when its time comes, and is active once it succeeds.

    Rows: id of each that was scheduled. Locks them in the common order and waits.
    """
    return _schedule().params(
        schedule_ids=arguments.identifiers("ids", ids),
        **template.due_values("schedule", process_at),
    )


@cache
def _schedule() -> Select[int]:
    schedulable = template.materialized(
        select(checkpoints.c.id)
        .where(
            checkpoints.c.id == any_(template.bigints("schedule_ids")),
            checkpoints.c.reserved_until.is_(None),
            or_(
                checkpoints.c.stream_version > checkpoints.c.stream_position,
                checkpoints.c.status != template.ACTIVE,
            ),
        )
        .order_by(checkpoints.c.subscription_id, checkpoints.c.stream_name)
        .with_for_update(of=checkpoints, key_share=True),
        "schedulable",
    )
    scheduled = (
        template.update_checkpoints()
        .where(template.is_one_of(schedulable))
        .values(process_at=template.due_at("schedule"))
        .returning(checkpoints.c.id)
        .cte("scheduled")
    )
    return select(scheduled.c.id)
