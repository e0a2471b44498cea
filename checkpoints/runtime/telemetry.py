"""What a consumer tells of its work: log records, and OpenTelemetry where it is installed.

The extra `opentelemetry` brings the API alone; without it, or without an SDK configured, nothing is
measured and nothing is spent.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any

from sqlalchemy import Engine

from checkpoints.executing import Checkpoints
from checkpoints.records import Reservation, SubscriptionMetrics

metrics: Any = None
trace: Any = None
with suppress(ImportError):
    from opentelemetry import metrics, trace

__all__ = ["Telemetry", "logger", "observe_lag"]

# Nothing was configured that could take a span.
_NOT_TRACING = () if trace is None else (trace.ProxyTracerProvider, trace.NoOpTracerProvider)

_NO_SPAN = nullcontext()

logger = logging.getLogger("checkpoints")

_COUNTERS = {
    "reserved": "Checkpoints reserved",
    "processed": "Checkpoints whose position was updated",
    "retried": "Attempts that failed and wait for another",
    "failed": "Checkpoints given up",
    "lost": "Reservations lost while they were held",
    "expired": "Reservations of dead or stuck consumers, counted as attempts",
}

_STATES = ("ready", "due", "reserved", "expired", "retry", "failed")


def fields(group: str, reservation: Reservation, **more: object) -> dict[str, object]:
    """The ids of a checkpoint, as fields of a log record (`extra`)."""
    return {
        "group": group,
        "checkpoint_id": reservation.id,
        "subscription": reservation.subscription_name,
        "stream_name": reservation.stream_name,
        "stream_position": reservation.stream_position,
        "stream_version": reservation.stream_version,
        **more,
    }


class Telemetry:
    """Spans, counters and histograms of one consumer; each a no-op without OpenTelemetry."""

    def __init__(self, group: str) -> None:
        self._group = group
        self._counters: dict[str, Any] = {}
        self._tracer: Any = None
        self._latency: Any = None
        self._duration: Any = None
        if trace is not None:
            self._tracer = trace.get_tracer("checkpoints")
            meter = metrics.get_meter("checkpoints")
            self._counters = {
                outcome: meter.create_counter(
                    f"checkpoints.{outcome}", unit="{checkpoint}", description=description
                )
                for outcome, description in _COUNTERS.items()
            }
            self._latency = meter.create_histogram(
                "checkpoints.latency",
                unit="s",
                description="From when the checkpoint was due to the commit of its position",
            )
            self._duration = meter.create_histogram(
                "checkpoints.duration",
                unit="s",
                description="From the start of the handler to the commit of the position",
            )

    def count(self, outcome: str, number: int = 1, subscription: str | None = None) -> None:
        """Count checkpoints by what became of them."""
        counter = self._counters.get(outcome)
        if counter is not None and number:
            with suppress(Exception):
                counter.add(number, self._attributes(subscription))

    def processed(self, reservation: Reservation, took: float, latency: float) -> None:
        """A checkpoint was processed; the seconds since its handler began, and since it was due."""
        if trace is not None:
            attributes = self._attributes(reservation.subscription_name)
            with suppress(Exception):
                self._counters["processed"].add(1, attributes)
            self._latency.record(latency, attributes)
            self._duration.record(took, attributes)

    def failed(self, reservation: Reservation, error: BaseException, *, is_last: bool) -> None:
        """An attempt failed: in the span too, where there is one."""
        self.count("failed" if is_last else "retried", 1, reservation.subscription_name)
        if trace is not None:
            span = trace.get_current_span()
            span.record_exception(error)
            span.set_status(trace.StatusCode.ERROR)

    def span(self, reservation: Reservation) -> AbstractContextManager[None]:
        """A span around the handler and the update of the position."""
        # Asked each time: the application may configure tracing after it made the consumer.
        if trace is None or isinstance(trace.get_tracer_provider(), _NOT_TRACING):
            return _NO_SPAN
        return self._span(reservation)

    @contextmanager
    def _span(self, reservation: Reservation) -> Iterator[None]:
        stack = ExitStack()
        # Tracing that fails must not keep the handler from its work.
        with suppress(Exception):
            attributes = self._attributes(reservation.subscription_name) | {
                "checkpoints.id": reservation.id,
                "checkpoints.stream_name": reservation.stream_name,
                "checkpoints.stream_position": reservation.stream_position,
                "checkpoints.stream_version": reservation.stream_version,
            }
            stack.enter_context(
                self._tracer.start_as_current_span(
                    f"process {reservation.subscription_name}", attributes=attributes
                )
            )
        try:
            yield
        finally:
            with suppress(Exception):
                stack.close()

    def _attributes(self, subscription: str | None) -> dict[str, str]:
        attributes = {"checkpoints.group": self._group}
        if subscription is not None:
            attributes["checkpoints.subscription"] = subscription
        return attributes


def observe_lag(engine: Engine) -> None:
    """Report what is at hand for each subscription, as gauges, whenever metrics are collected.

    `checkpoints.lag`: messages left. `checkpoints.at_hand`: checkpoints by the attribute
    `checkpoints.state` (ready, due, reserved, expired, retry, failed). One statement a collection,
    as `Checkpoints.get_metrics()`; while the database is away, no values. Call it once in a
    process, and in one process alone: all see the same. A no-op without OpenTelemetry.
    """
    if metrics is None:
        return
    measured: list[SubscriptionMetrics] = []
    measured_at = float("-inf")

    def at_hand() -> list[SubscriptionMetrics]:
        nonlocal measured, measured_at
        # The gauges of one collection share one statement.
        if time.monotonic() - measured_at > 1:
            measured_at = time.monotonic()
            measured = []
            try:
                with engine.connect() as connection:
                    measured = Checkpoints(connection).get_metrics()
            except Exception as error:
                logger.debug("the lag could not be measured: %s", error)
        return measured

    def observed(
        values: Callable[[SubscriptionMetrics], Iterable[tuple[float, dict[str, str]]]],
    ) -> Callable[[Any], Iterator[Any]]:
        def observe(_options: Any) -> Iterator[Any]:
            for one in at_hand():
                names = {"checkpoints.group": one.group_name, "checkpoints.subscription": one.name}
                for value, attributes in values(one):
                    yield metrics.Observation(value, names | attributes)

        return observe

    meter = metrics.get_meter("checkpoints")
    meter.create_observable_gauge(
        "checkpoints.lag",
        [observed(lambda one: [(one.lag, {})])],
        unit="{message}",
        description="Messages left to process",
    )
    meter.create_observable_gauge(
        "checkpoints.at_hand",
        [
            observed(
                lambda one: [
                    (getattr(one, state), {"checkpoints.state": state}) for state in _STATES
                ]
            )
        ],
        unit="{checkpoint}",
        description="Checkpoints by how they stand",
    )
