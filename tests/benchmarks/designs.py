"""The designs, alike in data and load: one table, two hot tables, and the toolkit of today."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from tests.benchmarks.load import Clients, add_checkpoints, add_subscription, vacuum
from tests.benchmarks.plan import Plan
from tests.benchmarks.results import Say, Series
from tests.benchmarks.rounds import interleave
from tests.benchmarks.server import Server
from tests.benchmarks.texts import GROUP
from tests.benchmarks.work import Job, connect

__all__ = ["DESIGNS", "run"]

PART = "designs"

# Names as in reports, and in alembic.
DESIGNS = ("0.22.0", "0.23.0", "head")

_FOREIGN = "another group"


def run(server: Server, clients: Clients, plan: Plan, say: Say) -> list[Series]:
    """Measure all designs in turns, on databases of their own that stand on one server."""
    made = {}
    for design in DESIGNS:
        say(f"designs: filling {design}")
        made[design] = _filled(server, design, plan)
    try:
        return _measured(server, clients, plan, say, made)
    finally:
        for url in made.values():
            server.drop(url)


def _measured(
    server: Server, clients: Clients, plan: Plan, say: Say, made: Mapping[str, str]
) -> list[Series]:
    server.settle()
    where = f"{plan.total:,} checkpoints, {plan.ready:,} ready"
    series = [
        _cycles(clients, plan, say, made, number, f"{where}, {_clients(number)}")
        for number in plan.clients
    ]
    series += [_recording(clients, plan, say, made, size) for size in plan.record_sizes]

    for design, url in made.items():
        say(f"designs: {plan.backlog:,} ready of another group: filling {design}")
        (foreign,) = add_subscription(url, "foreign", group=_FOREIGN)
        add_checkpoints(url, [foreign], plan.backlog, ready=plan.backlog, due="-1 day")
        vacuum(url)
    server.settle()
    number = plan.backlog_clients
    title = f"and {plan.backlog:,} ready of another group, {_clients(number)}"
    series.append(_cycles(clients, plan, say, made, number, title))

    for url in made.values():
        _move_and_pause(url)
    title = f"and {plan.backlog:,} ready of a paused subscription, {_clients(number)}"
    series.append(_cycles(clients, plan, say, made, number, title))
    return series


def _filled(server: Server, design: str, plan: Plan) -> str:
    url = server.create(design)
    (subscription,) = add_subscription(url, "work")
    add_checkpoints(url, [subscription], plan.total, ready=plan.ready)
    # Who is recorded for is somebody else, so that what is recorded is not reserved meanwhile.
    (recorded,) = add_subscription(url, "recorded", group="recorded")
    add_checkpoints(url, [recorded], _streams(plan), ready=0)
    vacuum(url)
    return url


def _move_and_pause(url: str) -> None:
    """The other group's subscription becomes a paused one of this."""
    with connect(url) as connection:
        connection.execute(
            "UPDATE checkpoints.subscriptions SET status = 'paused', subscription_group_id ="
            " (SELECT id FROM checkpoints.subscription_groups WHERE name = %s)"
            " WHERE name = 'foreign-1'",
            (GROUP,),
        )


def _cycles(
    clients: Clients, plan: Plan, say: Say, made: Mapping[str, str], number: int, title: str
) -> Series:
    def measure(design: str) -> float:
        job = Job(work="psycopg", url=made[design], design=design)
        return clients.rate(job, number, seconds=plan.seconds, warm_up=plan.warm_up)

    say(f"designs: {title}")
    contestants = {design: lambda design=design: measure(design) for design in made}
    return Series(PART, title, "cycles/s", DESIGNS[0], interleave(contestants, plan.rounds))


def _recording(
    clients: Clients, plan: Plan, say: Say, made: Mapping[str, str], size: int
) -> Series:
    def measure(design: str) -> float:
        with connect(made[design]) as connection:
            row = connection.execute(
                "SELECT id FROM checkpoints.subscriptions WHERE name = 'recorded-1'"
            ).fetchone()
        assert row is not None
        job = Job(
            work="record",
            url=made[design],
            design=design,
            size=size,
            subscription_id=row[0],
            first=1,
            streams=_streams(plan),
        )
        return statistics.median(clients.calls(job, plan.calls(size), warm_up=6)) / 1000

    title = f"record {size:,}"
    say(f"designs: {title}")
    contestants = {design: lambda design=design: measure(design) for design in made}
    samples = interleave(contestants, plan.rounds)
    return Series(PART, title, "ms", DESIGNS[0], samples, more_is_better=False)


def _streams(plan: Plan) -> int:
    return 10 * max(plan.record_sizes)


def _clients(number: int) -> str:
    return f"{number} client{'s' * (number > 1)}"
