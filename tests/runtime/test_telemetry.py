"""What OpenTelemetry is told, with an SDK and without."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import Engine

from checkpoints.runtime import RetryPolicy, telemetry
from tests.runtime.consumers import Bench, Work, until
from tests.support.factories import FAR_AHEAD, LONG_AGO


class Told:
    """What the SDK was told."""

    def __init__(self) -> None:
        self.spans = InMemorySpanExporter()
        self.reader = InMemoryMetricReader()
        self.meters = MeterProvider([self.reader])
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.spans))

    def values(self, name: str) -> list[tuple[dict[str, Any], Any]]:
        data = self.reader.get_metrics_data()
        return [
            (
                dict(point.attributes or {}),
                getattr(point, "value", None) or getattr(point, "sum", 0),
            )
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[Told]:
    """An SDK of this test alone: the global one can be set only once in a process."""
    made = Told()
    monkeypatch.setattr(telemetry.metrics, "get_meter", made.meters.get_meter)
    monkeypatch.setattr(telemetry.trace, "get_tracer", made.tracers.get_tracer)
    monkeypatch.setattr(telemetry.trace, "get_tracer_provider", lambda: made.tracers)
    yield made
    made.meters.shutdown()
    made.tracers.shutdown()


async def nothing(_work: Work) -> None: ...


BALANCES = {"checkpoints.group": "accounts", "checkpoints.subscription": "balances"}


def test_a_span_and_counts_for_what_was_processed(bench: Bench, told: Told) -> None:
    ids = bench.fill("account-1", "account-2")

    bench.consumer(nothing).drain()

    spans = told.spans.get_finished_spans()
    assert [span.name for span in spans] == ["process balances"] * 2
    assert {(span.attributes or {})["checkpoints.id"] for span in spans} == set(ids)
    assert all(span.status.is_ok or span.status.is_unset for span in spans)
    assert told.values("checkpoints.reserved") == [({"checkpoints.group": "accounts"}, 2)]
    assert told.values("checkpoints.processed") == [(BALANCES, 2)]


def test_a_failure_is_in_the_span_and_counted(bench: Bench, told: Told) -> None:
    bench.fill("last", "again")

    async def failing(work: Work) -> None:
        raise ValueError("no") if work.reservation.stream_name == "last" else OSError("no")

    bench.consumer(failing, retry=RetryPolicy(max_attempts_by_type={ValueError: 1})).drain()

    for span in told.spans.get_finished_spans():
        assert not span.status.is_ok
        assert [event.name for event in span.events] == ["exception"]
    assert told.values("checkpoints.failed") == [(BALANCES, 1)]
    assert told.values("checkpoints.retried") == [(BALANCES, 1)]


def test_lost_and_expired_reservations_are_counted(bench: Bench, told: Told) -> None:
    bench.fill("account-1")
    bench.fill("dead", subscription="mails")
    bench.execute(
        "UPDATE checkpoints.checkpoints SET reserved_until = :at WHERE stream_name = 'dead'",
        at=LONG_AGO,
    )

    async def losing(_work: Work) -> None:
        bench.execute(
            "UPDATE checkpoints.checkpoints SET reserved_until = :at WHERE stream_name <> 'dead'",
            at=FAR_AHEAD,
        )

    bench.consumer(losing).drain()

    assert told.values("checkpoints.lost") == [(BALANCES, 1)]
    assert told.values("checkpoints.expired") == [({"checkpoints.group": "accounts"}, 1)]


def test_latency_is_from_when_it_was_due_to_when_it_was_done(bench: Bench, told: Told) -> None:
    bench.fill("account-1")
    bench.execute(
        "UPDATE checkpoints.checkpoints SET process_at = clock_timestamp() - interval '90 s'"
    )

    bench.consumer(nothing).drain()

    ((_, latency),) = told.values("checkpoints.latency")
    ((_, duration),) = told.values("checkpoints.duration")
    assert 90 < latency < 100
    assert 0 < duration < 5


def test_latency_of_an_extended_reservation_counts_from_the_first(bench: Bench, told: Told) -> None:
    bench.fill("account-1")
    started, go_on = threading.Event(), threading.Event()

    async def slow(work: Work) -> None:
        started.set()
        await work.wait(go_on)

    runner = bench.consumer(slow, reservation_timeout=timedelta(seconds=0.6))
    drained = runner.start_drain()
    assert started.wait(10)
    first = bench.ask("SELECT reserved_until FROM checkpoints.checkpoints")
    until(lambda: bench.ask("SELECT reserved_until FROM checkpoints.checkpoints") > first)
    go_on.set()
    drained.result(20)

    ((_, latency),) = told.values("checkpoints.latency")
    assert 0.2 <= latency < 5


def test_gauges_tell_the_lag(bench: Bench, told: Told, engine: Engine) -> None:
    bench.fill("account-1", "account-2")
    bench.fill("mail-1", subscription="mails", status="failed", retry_attempts=1)
    telemetry.observe_lag(engine)

    lag = told.values("checkpoints.lag")
    # One statement a collection, and a moment.
    states = {
        (attributes["checkpoints.subscription"], attributes["checkpoints.state"]): value
        for attributes, value in told.values("checkpoints.at_hand")
    }

    assert (BALANCES, 6) in lag
    assert states["balances", "due"] == 2
    assert states["mails", "failed"] == 1


def test_gauges_of_a_database_that_is_away_tell_nothing(
    bench: Bench, told: Told, engine: Engine
) -> None:
    bench.execute("ALTER TABLE checkpoints.subscriptions RENAME TO elsewhere")
    telemetry.observe_lag(engine)

    assert told.values("checkpoints.lag") == []


@pytest.mark.parametrize("what", ["get_meter", "get_tracer"])
def test_telemetry_that_raises_stops_no_work(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    bench.fill("account-1", "account-2")

    class Broken:
        def __init__(self, *_: Any) -> None: ...

        def create_counter(self, *_: Any, **__: Any) -> Any:
            return self

        create_histogram = create_counter

        def _fail(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("telemetry is broken")

        add = record = start_as_current_span = _fail

    module = telemetry.metrics if what == "get_meter" else telemetry.trace
    monkeypatch.setattr(module, what, Broken)

    assert bench.consumer(nothing).drain() == 2


WITHOUT = """
import sys
sys.modules["opentelemetry"] = None
from checkpoints.runtime import Consumer
from checkpoints.runtime.telemetry import Telemetry, observe_lag
telemetry = Telemetry("accounts")
telemetry.count("reserved")
with telemetry.span(None):
    pass
observe_lag(None)
assert telemetry._counters == {} and telemetry._tracer is None
"""


def test_nothing_is_needed_without_opentelemetry() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT], check=True)
