"""Growth: how the rate of the toolkit stands when one thing grows and all else stays.

A cycle is a reservation and an update of the position, in two commits; the checkpoint is ready
again at once. What grows is on databases of their own, all measured in the same rounds, and the
base is the smallest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

from tests.benchmarks.load import Clients, add_checkpoints, add_subscription, vacuum
from tests.benchmarks.plan import Plan
from tests.benchmarks.results import Say, Series
from tests.benchmarks.rounds import interleave
from tests.benchmarks.server import Server
from tests.benchmarks.work import Job, connect

__all__ = ["run"]

PART = "growth"

Fill = Callable[[str, int], None]


def run(server: Server, clients: Clients, plan: Plan, say: Say) -> list[Series]:
    """Measure all that may grow."""
    growth = _Growth(server, clients, plan, say)
    where = f"{plan.grown_total:,} checkpoints, {plan.grown_ready:,} ready"
    series = [growth.totals()]
    say("growth: filling the base")
    base = server.create()
    try:
        _fill(base, plan.grown_total, plan.grown_ready)
        vacuum(base)
        for axis, fill in (
            ("further ready checkpoints of the same subscription", _own),
            ("ready checkpoints of another group, due longer", _foreign),
            ("ready checkpoints of a paused subscription, due longer", _paused),
            ("checkpoints scheduled for tomorrow", _future),
        ):
            series.append(growth.of_copies(base, axis, plan.backlogs, fill))
        for axis, fill in (
            ("subscriptions of the group, one with work", _idle),
            ("subscriptions of the group, each with work", _busy),
        ):
            series.append(growth.of_copies(base, axis, plan.subscriptions, fill))
        series.append(growth.clients_of(base, where))
        series += growth.held(base, where)
        series.append(growth.recording(base))
        # Of these each is worked off once or twice meanwhile, not a hundred times.
        many = plan.grown_total // 2
        _own(base, many)
        vacuum(base)
        series += growth.held(base, f"{plan.grown_total:,} checkpoints and {many:,} more, ready")
    finally:
        server.drop(base)
    return series


class _Growth:
    """One run of this part."""

    def __init__(self, server: Server, clients: Clients, plan: Plan, say: Say) -> None:
        self._server = server
        self._clients = clients
        self._plan = plan
        self._say = say

    def totals(self) -> Series:
        """Checkpoints in all."""
        plan = self._plan

        def fill(url: str, total: int) -> None:
            _fill(url, total, min(plan.grown_ready, total))

        return self._grown("checkpoints in all", plan.totals, self._server.create, fill)

    def of_copies(self, base: str, axis: str, sizes: tuple[int, ...], fill: Fill) -> Series:
        """Something that is added to copies of a base."""
        return self._grown(axis, sizes, lambda: self._server.copy(base), fill)

    def clients_of(self, url: str, where: str) -> Series:
        """Clients at the same time."""
        self._say("growth: clients")
        contestants = {
            f"{number:,}": partial(self._rate, url, number) for number in self._plan.many_clients
        }
        return self._series("clients", f"clients: {where}", contestants)

    def held(self, url: str, where: str) -> list[Series]:
        """A transaction that is held open, so that no dead row can be removed.

        Before, during and after cannot be interleaved: they are in this order, in one round. In
        each phase clients that look from the beginning, and such that pass `due_since`, take turns.
        """
        plan = self._plan
        self._say("growth: a transaction held open")
        found: dict[str, dict[str, list[float]]] = {"": {}, ", with due_since": {}}

        def rates(phase: str) -> None:
            for variant, samples in found.items():
                job = _job(url)
                job["due_since"] = variant != ""
                samples[phase] = [self._measure(job, plan.grown_clients, plan.held_seconds / 20)]

        rates("before")
        with connect(url) as holder:
            holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            holder.execute("SELECT count(*) FROM checkpoints.subscriptions")
            begun = time.monotonic()
            held = 0.0
            while held < plan.held_seconds:
                rates(f"held for {held:.0f} s")
                held = time.monotonic() - begun
            holder.execute("ROLLBACK")
        rates("after")
        vacuum(url)
        rates("after VACUUM")
        title = f"a transaction held open: {where}, {_clients(plan.grown_clients)}"
        return [
            Series(PART, f"{title}{variant}", "cycles/s", "before", samples)
            for variant, samples in found.items()
        ]

    def recording(self, url: str) -> Series:
        """Checkpoints recorded in one call."""
        plan = self._plan
        streams = 2 * max(plan.sizes)
        (subscription,) = add_subscription(url, "recorded", group="recorded")
        add_checkpoints(url, [subscription], streams, ready=0)
        vacuum(url)
        self._say("growth: checkpoints recorded in one call")

        def measure(size: int) -> float:
            job = Job(
                work="record",
                url=url,
                design="head",
                size=size,
                subscription_id=subscription,
                first=1,
                streams=streams,
            )
            taken = self._clients.calls(job, plan.calls(size), warm_up=6)
            return size * len(taken) / sum(taken) * 1e6

        contestants = {f"{size:,}": partial(measure, size) for size in plan.sizes}
        samples = interleave(contestants, plan.rounds)
        axis = "checkpoints recorded in one call"
        return Series(PART, axis, "checkpoints/s", f"{plan.sizes[0]:,}", samples, axis=axis)

    def _grown(
        self, axis: str, sizes: tuple[int, ...], create: Callable[[], str], fill: Fill
    ) -> Series:
        made: dict[int, str] = {}
        try:
            for size in sizes:
                self._say(f"growth: {axis}: filling {size:,}")
                made[size] = create()
                fill(made[size], size)
                vacuum(made[size])
            self._server.settle()
            number = self._plan.grown_clients
            contestants = {f"{size:,}": partial(self._rate, made[size], number) for size in sizes}
            return self._series(axis, f"{axis}, {_clients(number)}", contestants)
        finally:
            for url in made.values():
                self._server.drop(url)

    def _rate(self, url: str, number: int) -> float:
        return self._measure(_job(url), number, self._plan.seconds)

    def _measure(self, job: Job, number: int, seconds: float) -> float:
        return self._clients.rate(job, number, seconds=seconds, warm_up=self._plan.warm_up)

    def _series(
        self, axis: str, title: str, contestants: Mapping[str, Callable[[], float]]
    ) -> Series:
        samples = interleave(contestants, self._plan.rounds)
        return Series(PART, title, "cycles/s", next(iter(contestants)), samples, axis=axis)


def _job(url: str) -> Job:
    return Job(work="psycopg", url=url, design="head")


def _fill(url: str, total: int, ready: int) -> None:
    (subscription,) = add_subscription(url, "work")
    add_checkpoints(url, [subscription], total, ready=ready)


def _own(url: str, count: int) -> None:
    with connect(url) as connection:
        row = connection.execute(
            "SELECT id FROM checkpoints.subscriptions WHERE name = 'work-1'"
        ).fetchone()
    assert row is not None
    _add(url, row[0], count, "-1 hour", first=100_000_001)


def _foreign(url: str, count: int) -> None:
    (subscription,) = add_subscription(url, "foreign", group="another group")
    _add(url, subscription, count, "-1 day")


def _paused(url: str, count: int) -> None:
    (subscription,) = add_subscription(url, "paused", status="paused")
    _add(url, subscription, count, "-1 day")


def _future(url: str, count: int) -> None:
    (subscription,) = add_subscription(url, "future")
    _add(url, subscription, count, "1 day")


def _add(url: str, subscription: int, count: int, due: str, *, first: int = 1) -> None:
    if count:
        add_checkpoints(url, [subscription], count, ready=count, due=due, first=first)


def _idle(url: str, count: int) -> None:
    """The one with work is there already."""
    if count > 1:
        add_subscription(url, "idle", count=count - 1)


def _busy(url: str, count: int) -> None:
    """Each has as much work as the others; all of it together is the same for any number."""
    ids = add_subscription(url, "busy", count=count)
    with connect(url) as connection:
        ready = connection.execute(
            "DELETE FROM checkpoints.checkpoints WHERE stream_version > stream_position"
        ).rowcount
    ready = max(ready, count)
    add_checkpoints(url, ids, ready, ready=ready)


def _clients(number: int) -> str:
    return f"{number} client{'s' * (number > 1)}"
