"""Whether the rule between the main table and the hot tables holds, and how to mend it.

The triggers keep the rule whatever is written to `checkpoints`. What gets round them (a write to a
hot table, `session_replication_role = replica`, a partial restore) can break it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import (
    ColumnElement,
    FromClause,
    Select,
    Table,
    Text,
    and_,
    case,
    delete,
    exists,
    func,
    null,
    or_,
    select,
    union_all,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.dialects.postgresql import array as sql_array

from checkpoints import _arguments as arguments
from checkpoints.statements import _template as template
from checkpoints.tables import checkpoints, checkpoints_ready, checkpoints_reserved

__all__ = ["audit_checkpoints", "repair_checkpoints"]


def _violations() -> ColumnElement[list[str]]:
    """The rules that a checkpoint breaks, as an array of texts."""
    active = checkpoints.c.status == template.ACTIVE
    lags = checkpoints.c.stream_version > checkpoints.c.stream_position
    unreserved = checkpoints.c.reserved_until.is_(None)
    unscheduled = checkpoints.c.process_at.is_(None)
    is_ready = and_(~unscheduled, unreserved)
    rules = {
        "lags and has no process_at": and_(active, lags, unscheduled),
        "waits for a retry and has no process_at": and_(
            checkpoints.c.status == template.RETRY, unscheduled
        ),
        "has nothing to do and a process_at": and_(active, ~lags, unreserved, ~unscheduled),
        "is missing in checkpoints_ready": and_(is_ready, checkpoints_ready.c.id.is_(None)),
        "has another process_at in checkpoints_ready": and_(
            is_ready, checkpoints_ready.c.process_at != checkpoints.c.process_at
        ),
        "has another subscription_id in checkpoints_ready": (
            checkpoints_ready.c.subscription_id != checkpoints.c.subscription_id
        ),
        "must not be in checkpoints_ready": and_(
            or_(unscheduled, ~unreserved), checkpoints_ready.c.id.is_not(None)
        ),
        "is missing in checkpoints_reserved": and_(
            ~unreserved, checkpoints_reserved.c.id.is_(None)
        ),
        "has another reserved_until in checkpoints_reserved": (
            checkpoints_reserved.c.reserved_until != checkpoints.c.reserved_until
        ),
        "has another subscription_id in checkpoints_reserved": (
            checkpoints_reserved.c.subscription_id != checkpoints.c.subscription_id
        ),
        "must not be in checkpoints_reserved": and_(
            unreserved, checkpoints_reserved.c.id.is_not(None)
        ),
    }
    return func.array_remove(
        sql_array(
            [case((broken, template.word(rule)), else_=null()) for rule, broken in rules.items()]
        ),
        null(),
        type_=ARRAY(Text()),
    )


def _projected() -> FromClause:
    return checkpoints.outerjoin(
        checkpoints_ready, checkpoints_ready.c.id == checkpoints.c.id
    ).outerjoin(checkpoints_reserved, checkpoints_reserved.c.id == checkpoints.c.id)


def _orphans(hot: Table) -> tuple[ColumnElement[bool], ColumnElement[str]]:
    """Rows of a hot table whose checkpoint is gone, and how that is called."""
    is_orphan = ~exists(select(checkpoints.c.id).where(checkpoints.c.id == hot.c.id))
    return is_orphan, template.word(f"is in {hot.name} and there is no such checkpoint")


_HOT_TABLES = (checkpoints_ready, checkpoints_reserved)


def audit_checkpoints() -> Select[int, str]:
    """Every violation of the rule. It reads all of the three tables and locks nothing.

    Rows: id, violation; one row for each rule that a checkpoint breaks. No row: all is well.
    """
    return _audit()


@cache
def _audit() -> Select[int, str]:
    violation: ColumnElement[Any] = func.unnest(_violations(), type_=Text()).label("violation")
    found = [select(checkpoints.c.id, violation).select_from(_projected())]
    for hot in _HOT_TABLES:
        is_orphan, called = _orphans(hot)
        found.append(select(hot.c.id, called).where(is_orphan))
    either = union_all(*found).subquery("either")
    return select(either.c.id, either.c.violation).order_by(either.c.id, either.c.violation)


def repair_checkpoints(*, limit: int = 1000) -> Select[int, list[str]]:
    """Mend checkpoints that break the rule, at most `limit`.

    The main row is believed; rows of the hot tables without one are deleted, all at once. Call it,
    each time in a transaction of its own, until no row comes back.

    Rows: id, violations (the list of what was mended). No row: all is well. Reads all of the three
    tables; locks what it mends in the common order and waits.
    """
    return _repair().params(repair_limit=arguments.limit("limit", limit))


@cache
def _repair() -> Select[int, list[str]]:
    violations = _violations()
    broken = template.materialized(
        select(checkpoints.c.id, violations.label("violations"))
        .select_from(_projected())
        .where(func.cardinality(violations) > template.ZERO)
        .order_by(checkpoints.c.subscription_id, checkpoints.c.stream_name)
        .limit(template.integer("repair_limit"))
        .with_for_update(of=checkpoints, key_share=True),
        "broken",
    )
    # An update of nothing: the trigger then projects the row anew, and sees what is there now.
    repaired = (
        template.update_checkpoints()
        .where(template.is_one_of(broken))
        .values(process_at=checkpoints.c.process_at)
        .returning(checkpoints.c.id)
        .cte("repaired")
    )
    mended = [select(repaired.c.id, broken.c.violations).join(broken, broken.c.id == repaired.c.id)]
    for hot in _HOT_TABLES:
        is_orphan, called = _orphans(hot)
        deleted = delete(hot).where(is_orphan).returning(hot.c.id).cte(f"deleted_of_{hot.name}")
        mended.append(select(deleted.c.id, sql_array([called])))
    either = union_all(*mended).subquery("either")
    return select(either.c.id, either.c.violations)
