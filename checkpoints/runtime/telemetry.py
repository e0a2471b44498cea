"""What a consumer tells of its work: log records, and OpenTelemetry where it is installed.

The extra `opentelemetry` brings the API alone; without it, or without an SDK configured, nothing is
measured and nothing is spent.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from checkpoints.records import Reservation

try:
    from opentelemetry import metrics, trace
except ImportError:
    metrics = trace = None

__all__ = ["Telemetry", "logger"]

logger = logging.getLogger("checkpoints")


def fields(reservation: Reservation, **more: object) -> dict[str, object]:
    """The ids of a checkpoint, as fields of a log record (`extra`)."""
    return {
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
        if trace is not None:
            self._tracer = trace.get_tracer("checkpoints")
            meter = metrics.get_meter("checkpoints")
            self._counters = {
                outcome: meter.create_counter(
                    f"checkpoints.{outcome}", unit="{checkpoint}", description=description
                )
                for outcome, description in {
                    "reserved": "Checkpoints reserved",
                    "processed": "Checkpoints whose position was updated",
                    "retried": "Attempts that failed and wait for another",
                    "failed": "Checkpoints given up",
                    "lost": "Reservations lost while a handler ran",
                    "expired": "Reservations of dead or stuck consumers, counted as attempts",
                }.items()
            }
            self._latency = meter.create_histogram(
                "checkpoints.latency",
                unit="s",
                description="From the reservation to the commit of the position",
            )

    def count(self, outcome: str, number: int = 1, subscription: str | None = None) -> None:
        """Count checkpoints by what became of them."""
        counter = self._counters.get(outcome)
        if counter is not None and number:
            counter.add(number, self._attributes(subscription))

    def done(self, reservation: Reservation, took: timedelta) -> None:
        """A checkpoint was processed."""
        self.count("processed", 1, reservation.subscription_name)
        if self._latency is not None:
            self._latency.record(
                took.total_seconds(), self._attributes(reservation.subscription_name)
            )

    @contextmanager
    def span(self, reservation: Reservation) -> Iterator[None]:
        """A span around the handler and the update of the position."""
        if self._tracer is None:
            yield
            return
        attributes = self._attributes(reservation.subscription_name) | {
            "checkpoints.id": reservation.id,
            "checkpoints.stream_name": reservation.stream_name,
            "checkpoints.stream_position": reservation.stream_position,
            "checkpoints.stream_version": reservation.stream_version,
        }
        with self._tracer.start_as_current_span(
            f"process {reservation.subscription_name}", attributes=attributes
        ):
            yield

    def _attributes(self, subscription: str | None) -> dict[str, str]:
        attributes = {"checkpoints.group": self._group}
        if subscription is not None:
            attributes["checkpoints.subscription"] = subscription
        return attributes
