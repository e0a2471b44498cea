"""How a checkpoint may end in a consumer, what is recorded and said of it; without any waiting."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum, auto
from typing import Any, Self

from checkpoints.records import CheckpointStatus, ExpiredReservation, JSONValue, Reservation
from checkpoints.runtime.retry import RetryPolicy, describe_error
from checkpoints.runtime.settings import ConsumerSettings
from checkpoints.runtime.telemetry import Telemetry, fields, logger

CONFLICTS = 20
"""After so many conflicts with other transactions in a row, one counts as the handler's error."""

RECOVERED_AT_ONCE = 100


class Goal(Enum):
    """When a consumer ends, besides being stopped."""

    NEVER = auto()
    DRAINED = auto()
    ONE_BATCH = auto()


@dataclass(slots=True)
class Handled:
    """What the handler answered, over the attempts of one run."""

    position: int | None = None
    raised: bool = False
    outside: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """An attempt that failed, and what follows."""

    error: BaseException
    attempt: int
    status: CheckpointStatus
    delay: timedelta | None
    description: JSONValue

    @classmethod
    def of(cls, reservation: Reservation, error: BaseException, retry: RetryPolicy) -> Self:
        """What the policy says of this error."""
        attempt = reservation.retry_attempts + 1
        if attempt >= retry.attempts_for(error):
            return cls(error, attempt, CheckpointStatus.FAILED, None, describe_error(error))
        return cls(
            error,
            attempt,
            CheckpointStatus.RETRY,
            retry.delay_after(attempt),
            describe_error(error),
        )


def check_transaction(reservation: Reservation, *, is_active: bool) -> None:
    """A handler must not end the transaction: position and writes would commit apart."""
    if not is_active:
        raise RuntimeError(
            f"the handler of {reservation.subscription_name!r} ended the transaction that it was "
            "given; it must leave that to the consumer"
        )


def pause(
    reservation: Reservation, position: int | None, settings: ConsumerSettings
) -> timedelta | None:
    """How long a checkpoint waits that made no progress: else it came back at once, for ever."""
    if position is None or position > reservation.stream_position:
        return None
    return settings.poll_interval


def recovery(settings: ConsumerSettings) -> dict[str, Any]:
    """The arguments of the recovery."""
    return {
        "group_name": settings.group,
        "max_attempts": settings.retry.max_attempts,
        "process_at": settings.retry.first_delay,
        "limit": RECOVERED_AT_ONCE,
    }


def timed_out(reservation: Reservation, longest: timedelta | None) -> TimeoutError:
    """The error of a handler that took too long."""
    seconds = 0 if longest is None else longest.total_seconds()
    return TimeoutError(
        f"the handler of {reservation.subscription_name!r} took longer than {seconds:g} s"
    )


def log_processed(telemetry: Telemetry, reservation: Reservation, took: timedelta) -> None:
    """The position was updated."""
    telemetry.done(reservation, took)
    logger.debug("processed in %.3f s", took.total_seconds(), extra=fields(reservation))


def log_lost(telemetry: Telemetry, reservation: Reservation) -> None:
    """The reservation went to another while the handler ran."""
    telemetry.count("lost", 1, reservation.subscription_name)
    logger.warning(
        "the reservation was lost; what the handler wrote is rolled back",
        extra=fields(reservation),
    )


def log_failure(telemetry: Telemetry, reservation: Reservation, failure: Failure) -> None:
    """An attempt failed, and that was recorded."""
    failed = failure.status is CheckpointStatus.FAILED
    telemetry.count("failed" if failed else "retried", 1, reservation.subscription_name)
    logger.log(
        logging.ERROR if failed else logging.WARNING,
        "attempt %d failed%s: %s",
        failure.attempt,
        ", the last one" if failed else "",
        failure.error,
        exc_info=failure.error,
        extra=fields(reservation, attempt=failure.attempt),
    )


def log_unrecorded(reservation: Reservation, failure: Failure, error: BaseException) -> None:
    """An attempt failed, and that could not be recorded."""
    logger.error(
        "an error could not be recorded, and its reservation will expire: %s",
        error,
        exc_info=failure.error,
        extra=fields(reservation, attempt=failure.attempt),
    )


def log_not_given_back(reservation: Reservation, error: BaseException) -> None:
    """A reservation outlives its consumer."""
    logger.warning(
        "a reservation could not be given back and will expire: %s",
        error,
        extra=fields(reservation),
    )


def log_expired(telemetry: Telemetry, expired: Sequence[ExpiredReservation]) -> None:
    """Reservations of consumers that died or hung were ended."""
    telemetry.count("expired", len(expired))
    for record in expired:
        failed = record.status is CheckpointStatus.FAILED
        logger.log(
            logging.ERROR if failed else logging.WARNING,
            "a reservation expired; %s",
            "the checkpoint has failed" if failed else "another attempt follows",
            extra={"checkpoint_id": record.id, "attempt": record.retry_attempts},
        )
