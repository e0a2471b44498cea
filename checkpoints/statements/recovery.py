"""What ends the reservations of consumers that are gone."""

from __future__ import annotations

from datetime import timedelta
from functools import cache

from sqlalchemy import Float, Integer, Select, case, func, literal_column, null, select
from sqlalchemy.dialects.postgresql import INTERVAL, JSONB

from checkpoints import _arguments as arguments
from checkpoints.records import CheckpointStatus
from checkpoints.statements import _template as template
from checkpoints.statements._claiming import claim
from checkpoints.tables import checkpoints, checkpoints_reserved

__all__ = [
    "record_expired_checkpoint_reservations",
    "recover_expired_checkpoint_reservations",
]


def recover_expired_checkpoint_reservations(group_name: str, *, limit: int = 100) -> Select[int]:
    """End the reservations of a group that have expired, at most `limit`.

    What still has work is ready again, its status kept. Any process may run it, at any time.

    Rows: id of each whose reservation ended. Locks them, and never waits for a lock.
    """
    return _recover().params(
        recover_group_name=arguments.name("group_name", group_name),
        recover_limit=arguments.limit("limit", limit),
    )


@cache
def _recover() -> Select[int]:
    expired = claim(
        "recover",
        checkpoints_reserved.c.reserved_until,
        checkpoints.c.reserved_until <= template.statement_time(),
    )
    recovered = (
        template.update_checkpoints()
        .where(template.is_one_of(expired))
        .values(reserved_until=null())
        .returning(checkpoints.c.id)
        .cte("recovered")
    )
    return select(recovered.c.id)


def record_expired_checkpoint_reservations(
    group_name: str,
    *,
    max_attempts: int,
    process_at: timedelta = timedelta(seconds=1),
    limit: int = 100,
) -> Select[int, CheckpointStatus, int]:
    """Recover, and count each reservation that expired as an attempt that failed.

    For consumers whose handlers may bring their process down: a message that kills every worker
    ends as failed instead of being given to one after the other for ever. Below `max_attempts`
    the status is retry, and the next attempt comes after `process_at` (half of it more or less, by
    chance), doubled with each attempt before, an hour at most; then the status is failed. What has
    nothing left to do is left as it is. The expiry is appended to `retries` as an error of the
    type `ReservationExpired`.

    Rows: id, status, retry_attempts of each whose reservation ended. Locks them, and never waits
    for a lock.
    """
    return _record_expired().params(
        record_expired_group_name=arguments.name("group_name", group_name),
        record_expired_max_attempts=arguments.limit("max_attempts", max_attempts),
        record_expired_process_in=arguments.timeout("process_at", process_at),
        record_expired_limit=arguments.limit("limit", limit),
    )


@cache
def _record_expired() -> Select[int, CheckpointStatus, int]:
    expired = claim(
        "record_expired",
        checkpoints_reserved.c.reserved_until,
        checkpoints.c.reserved_until <= template.statement_time(),
    )
    has_work = (checkpoints.c.status != template.ACTIVE) | (
        checkpoints.c.stream_version > checkpoints.c.stream_position
    )
    attempts = checkpoints.c.retry_attempts + literal_column("1", Integer())
    exhausted = attempts >= template.integer("record_expired_max_attempts")
    # 2^12 seconds are more than an hour already; a greater exponent might overflow.
    doublings = func.least(checkpoints.c.retry_attempts, literal_column("12", Integer()))
    # Those that a process had together come apart, for one of them may have killed it: together
    # they would be killed again and again, and end as failed together.
    spread = literal_column("0.5", Float()) + func.random(type_=Float())
    delay = func.least(
        template.duration("record_expired_process_in").op("*", return_type=INTERVAL())(
            func.power(literal_column("2", Integer()), doublings) * spread
        ),
        literal_column("interval '1 hour'"),
    )
    error = func.jsonb_build_object(
        template.word("type"),
        template.word("ReservationExpired"),
        template.word("message"),
        func.concat(
            template.word("the reservation until "),
            checkpoints.c.reserved_until,
            template.word(" expired: the consumer was gone or stuck"),
        ),
        type_=JSONB,
    )

    recorded = (
        template.update_checkpoints()
        .where(template.is_one_of(expired))
        .values(
            reserved_until=null(),
            status=case(
                (has_work & exhausted, template.FAILED),
                (has_work, template.RETRY),
                else_=checkpoints.c.status,
            ),
            retry_attempts=case((has_work, attempts), else_=checkpoints.c.retry_attempts),
            retries=case(
                (has_work, template.appended(attempts, checkpoints.c.stream_position, error)),
                else_=checkpoints.c.retries,
            ),
            process_at=case(
                (has_work & exhausted, null()),
                (has_work, template.statement_time() + delay),
                else_=checkpoints.c.process_at,
            ),
        )
        .returning(checkpoints.c.id, checkpoints.c.status, checkpoints.c.retry_attempts)
        .cte("expired_recorded")
    )
    return select(recorded.c.id, recorded.c.status, recorded.c.retry_attempts)
