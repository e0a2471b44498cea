"""How much is measured, and on how much."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

__all__ = ["FULL", "QUICK", "TINY", "Plan"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes, numbers of clients, and times; a measurement takes `warm_up` + `seconds`."""

    name: str
    rounds: int
    seconds: float
    warm_up: float

    # Designs.
    total: int
    ready: int
    backlog: int
    clients: tuple[int, ...]
    backlog_clients: int
    record_sizes: tuple[int, ...]
    record_calls: int

    # Limits.
    limit_clients: tuple[int, ...]
    batch: int

    # Growth: of a database of this many, unless it is this that grows.
    grown_total: int
    grown_ready: int
    grown_clients: int
    totals: tuple[int, ...]
    backlogs: tuple[int, ...]
    subscriptions: tuple[int, ...]
    many_clients: tuple[int, ...]
    held_seconds: float
    sizes: tuple[int, ...]

    # Peers.
    items: int
    other_items: int
    processes: tuple[int, ...]
    others: tuple[Literal["foreign", "paused"], ...]
    """What else may wait, at the most processes."""
    peer_rounds: int
    peer_limit: float
    """After so many seconds a drain is given up; its rate until then is what counts."""

    def calls(self, size: int) -> int:
        """How many calls are timed that record so many: of small ones, more."""
        return self.record_calls * (10 if size < 100 else 1)

    def with_rounds(self, rounds: int) -> Plan:
        """With so many rounds in every part."""
        return replace(self, rounds=rounds, peer_rounds=rounds)

    def with_largest(self, largest: int) -> Plan:
        """Also with so many checkpoints in all."""
        return replace(self, totals=tuple(sorted({*self.totals, largest})))


FULL = Plan(
    name="full",
    rounds=3,
    seconds=3.0,
    warm_up=0.5,
    total=1_000_000,
    ready=5_000,
    backlog=500_000,
    clients=(1, 4, 16),
    backlog_clients=4,
    record_sizes=(1, 1_000),
    record_calls=20,
    limit_clients=(1, 4),
    batch=100,
    grown_total=100_000,
    grown_ready=1_000,
    grown_clients=4,
    totals=(1_000, 10_000, 100_000, 1_000_000),
    backlogs=(0, 1_000, 10_000, 100_000),
    subscriptions=(1, 10, 100, 1_000),
    many_clients=(1, 2, 4, 8, 16, 32),
    held_seconds=60.0,
    sizes=(1, 10, 100, 1_000, 10_000),
    items=50_000,
    other_items=200_000,
    processes=(1, 4),
    others=("foreign", "paused"),
    peer_rounds=2,
    peer_limit=8.0,
)

QUICK = replace(
    FULL,
    name="quick",
    rounds=2,
    seconds=0.4,
    warm_up=0.1,
    total=20_000,
    ready=500,
    backlog=10_000,
    clients=(1, 4),
    record_calls=5,
    grown_total=10_000,
    grown_ready=500,
    totals=(1_000, 10_000),
    backlogs=(0, 5_000),
    subscriptions=(1, 100),
    many_clients=(1, 4, 8),
    held_seconds=3.0,
    sizes=(1, 100, 1_000),
    items=2_000,
    other_items=5_000,
    processes=(2,),
    others=("foreign",),
    peer_rounds=1,
    peer_limit=5.0,
)

# For the tests: everything is run, and nothing is learnt.
TINY = replace(
    QUICK,
    name="tiny",
    rounds=1,
    seconds=0.05,
    warm_up=0.0,
    total=200,
    ready=50,
    backlog=50,
    clients=(1, 2),
    backlog_clients=1,
    record_sizes=(1, 10),
    record_calls=2,
    limit_clients=(1,),
    batch=5,
    grown_total=200,
    grown_ready=50,
    grown_clients=1,
    totals=(100, 200),
    backlogs=(0, 50),
    subscriptions=(1, 5),
    many_clients=(1, 2),
    held_seconds=0.2,
    sizes=(1, 10),
    items=50,
    other_items=20,
    processes=(1,),
)
