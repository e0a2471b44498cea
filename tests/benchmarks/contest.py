"""Peers: other queues on PostgreSQL, and this toolkit doing the same, in the same rounds.

An item of ours is a checkpoint with one message to process. Every measurement has a database of
its own, a copy of one in which the contestant's schema, and the items that nobody is to do, are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Self

from alembic import command
from checkpoints import alembic_config
from tests.benchmarks.load import ClientFailed, Clients, add_checkpoints, add_subscription, vacuum
from tests.benchmarks.peers import PEERS, Kind, NotAllDone, Peer, PeerError
from tests.benchmarks.plan import Plan
from tests.benchmarks.results import Say, Series
from tests.benchmarks.rounds import order_of
from tests.benchmarks.server import Server
from tests.benchmarks.work import Job, connect

__all__ = ["Ours", "run", "versions"]

PART = "peers"

# More than any does one at a time with one process.
_FASTEST_SINGLE = 3_000
_BATCH = 100
_HANDLERS = 100


@dataclasses.dataclass(frozen=True)
class Ours:
    """This toolkit: by its statements, or by its `Consumer`.

    A drain by a consumer has 4 threads a process, and 2 where handlers share transactions. One by
    statements has 2 with one process, so that the server is not idle, and else one.
    """

    clients: Clients
    consumer: bool
    handlers: int = 1
    """How many handlers of the consumer share a transaction."""
    longest: float = 900.0
    """After so many seconds a drain is given up."""

    @property
    def name(self) -> str:
        if self.handlers > 1:
            return f"checkpoints, Consumer, {self.handlers} handlers a transaction"
        return "checkpoints, Consumer" if self.consumer else "checkpoints, statements"

    def missing(self) -> str | None:
        return None

    def version(self) -> str:
        return "head"

    def limited(self, seconds: float) -> Self:
        """The same, whose drains are given up after these seconds."""
        return dataclasses.replace(self, longest=seconds)

    def prepare(self, url: str) -> None:
        command.upgrade(alembic_config(url), "head")
        add_subscription(url, "work")
        add_subscription(url, "foreign", group="another group")
        add_subscription(url, "paused", status="paused")

    def add(self, url: str, count: int, kind: Kind) -> None:
        with connect(url) as connection:
            row = connection.execute(
                "SELECT id FROM checkpoints.subscriptions WHERE name = %s", (f"{kind}-1",)
            ).fetchone()
        assert row is not None
        due = "-1 hour" if kind == "work" else "-1 day"
        add_checkpoints(url, [row[0]], count, ready=count, version=1, due=due)
        vacuum(url)

    def drain(self, url: str, count: int, processes: int, batch: int) -> float:
        work = "consumer" if self.consumer else "threads" if processes == 1 else "toolkit"
        job = self._job(work, url, batch)
        drained = self.clients.drain(job, processes, limit=self.longest)
        if drained.done < count and drained.seconds >= 0.9 * self.longest:
            raise NotAllDone(
                self.name, drained.done, count, drained.seconds, f"the limit is {self.longest:g} s"
            )
        if drained.done != count:
            raise ClientFailed(f"{self.name}: {drained.done} of {count} items were done")
        return drained.seconds

    def _job(self, work: str, url: str, batch: int) -> Job:
        """By statements, too, only the update's commit waits for the disk, as a consumer has it."""
        return Job(
            work=work,
            url=url,
            batch=batch,
            ending=True,
            handlers=self.handlers,
            crash_safe=False,
        )

    def one_at_a_time(self, url: str, seconds: float, processes: int) -> float:
        if self.handlers > 1:
            raise ClientFailed("handlers that share a transaction are never one at a time")
        work = "running consumer" if self.consumer else "toolkit"
        job = self._job(work, url, 1)
        return self.clients.rate(job, processes, seconds=seconds, warm_up=1.0)


@dataclasses.dataclass(frozen=True)
class _Case:
    title: str
    processes: int
    others: Kind | None
    drains: bool


def run(server: Server, clients: Clients, plan: Plan, say: Say) -> list[Series]:
    """Measure all that can run here."""
    ours: tuple[Peer, ...] = (
        Ours(clients, consumer=False),
        Ours(clients, consumer=True),
        Ours(clients, consumer=True, handlers=_HANDLERS),
    )
    contestants: list[Peer] = []
    missing: dict[str, str] = {}
    for peer in (*ours, *PEERS):
        if why := peer.missing():
            missing[peer.name] = why
        else:
            contestants.append(peer.limited(plan.peer_limit))
    prepared: dict[tuple[str, Kind | None], str] = {}
    try:
        for others in (None, *plan.others):
            for contestant in list(contestants):
                say(f"peers: preparing {contestant.name} with {others or 'no'} others")
                url = prepared[contestant.name, others] = server.create(None)
                try:
                    contestant.prepare(url)
                    if others:
                        contestant.add(url, plan.other_items, others)
                except PeerError as error:
                    missing[contestant.name] = _said(error)
                    contestants.remove(contestant)
        return [
            _measured(server, plan, say, case, contestants, prepared, missing)
            for case in _cases(plan)
        ]
    finally:
        for url in prepared.values():
            server.drop(url)


def versions() -> dict[str, str]:
    """The peers that can run here, and which of them these are."""
    return {peer.name: peer.version() for peer in PEERS if peer.missing() is None}


def _cases(plan: Plan) -> Sequence[_Case]:
    def of(number: int) -> str:
        return f"{number} process{'es' * (number > 1)}"

    most = max(plan.processes)
    drain = f"drain {plan.items:,} items"
    names = {"foreign": "of another queue", "paused": "paused"}
    return [
        *(_Case(f"{drain}, {of(number)}", number, None, True) for number in plan.processes),
        *(_Case(f"one at a time, {of(number)}", number, None, False) for number in plan.processes),
        *(
            _Case(
                f"{drain}, {of(most)}, {plan.other_items:,} items {names[others]} waiting",
                most,
                others,
                True,
            )
            for others in plan.others
        ),
    ]


def _measured(
    server: Server,
    plan: Plan,
    say: Say,
    case: _Case,
    contestants: Sequence[Peer],
    prepared: dict[tuple[str, Kind | None], str],
    missing: dict[str, str],
) -> Series:
    """All contestants in rounds; who fails once is out of this case, and it is said why."""
    say(f"peers: {case.title}")
    series = Series(PART, case.title, "items/s", contestants[0].name, {}, missing={**missing})
    by_name = {contestant.name: contestant for contestant in contestants}
    for number in range(plan.peer_rounds):
        for name in order_of(list(by_name), number):
            if name in series.missing:
                continue
            url = server.copy(prepared[name, case.others])
            try:
                rate = _once(server, plan, case, by_name[name], url)
                series.samples.setdefault(name, []).append(rate)
            except (PeerError, ClientFailed) as error:
                series.samples.pop(name, None)
                series.missing[name] = f"{case.title}: {_said(error)}"
            finally:
                server.drop(url)
    series.samples = {name: series.samples[name] for name in by_name if name in series.samples}
    return series


def _once(server: Server, plan: Plan, case: _Case, contestant: Peer, url: str) -> float:
    """Items/s of one contestant, in a database of its own."""
    if not case.drains:
        supply = round((plan.seconds + 2) * _FASTEST_SINGLE * case.processes)
        contestant.add(url, supply, "work")
        server.settle()
        return contestant.one_at_a_time(url, plan.seconds, case.processes)
    contestant.add(url, plan.items, "work")
    server.settle()
    try:
        return plan.items / contestant.drain(url, plan.items, case.processes, _BATCH)
    except NotAllDone as error:
        # A drain that was cut short is a rate all the same, unless it did nothing.
        if not error.done:
            raise
        return error.done / error.seconds


def _said(error: Exception) -> str:
    """An error on one line of the report."""
    return " ".join(str(error).split())[:300]
