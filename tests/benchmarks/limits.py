"""Limits: the toolkit beside the very same SQL without it, and beside the least there can be.

What two bare tables reach, a DELETE and an INSERT in each of two commits, is near what the machine
can do; the rest is the price of the checkpoint, of the library and of Python, one by one.
"""

from __future__ import annotations

from functools import partial

from tests.benchmarks import pgbench
from tests.benchmarks.load import Clients, add_checkpoints, add_subscription, vacuum
from tests.benchmarks.plan import Plan
from tests.benchmarks.results import Say, Series
from tests.benchmarks.rounds import Measure, interleave
from tests.benchmarks.server import Server
from tests.benchmarks.texts import SQL
from tests.benchmarks.work import Job, connect

__all__ = ["BASE", "run"]

PART = "limits"
BASE = "psycopg, the toolkit's SQL"


def run(server: Server, clients: Clients, plan: Plan, say: Say) -> list[Series]:
    """One at a time and in batches, by all ways to the same work."""
    say("limits: filling")
    head, bare = _filled(server, plan), _bare(server, plan)
    try:
        server.settle()
        series = []
        for batch in (1, plan.batch):
            for number in plan.limit_clients:
                series.append(_series(server, clients, plan, say, (head, bare), number, batch))
        return series
    finally:
        server.drop(head)
        server.drop(bare)


def _series(
    server: Server,
    clients: Clients,
    plan: Plan,
    say: Say,
    made: tuple[str, str],
    number: int,
    batch: int,
) -> Series:
    head, bare = made

    def by(work: str, url: str = head, design: str = "head") -> Measure:
        job = Job(work=work, url=url, design=design, batch=batch)
        return partial(clients.rate, job, number, seconds=plan.seconds, warm_up=plan.warm_up)

    contestants: dict[str, Measure] = {
        BASE: by("psycopg"),
        "toolkit, autocommit": by("toolkit"),
        "toolkit, engine.begin()": by("transactions"),
        "psycopg, two bare tables": by("psycopg", bare, "two tables"),
    }
    missing = {}
    for name, url, design in (
        ("pgbench, the toolkit's SQL", head, "head"),
        ("pgbench, two bare tables", bare, "two tables"),
    ):
        script = pgbench.script(design, batch)
        if server.pgbench is None:
            missing[name] = "pgbench was found neither beside the server nor on the system"
        elif script is None:
            missing[name] = "a batch is an array of tokens, which pgbench cannot hand on"
        else:
            contestants[name] = partial(
                pgbench.rate, server.pgbench, url, script, number, plan.seconds, batch
            )
    how = "one at a time" if batch == 1 else f"batches of {batch}"
    title = f"{how}, {number} client{'s' * (number > 1)}"
    say(f"limits: {title}")
    samples = interleave(contestants, plan.rounds)
    return Series(PART, title, "checkpoints/s", BASE, samples, missing=missing)


def _filled(server: Server, plan: Plan) -> str:
    url = server.create()
    (subscription,) = add_subscription(url, "work")
    # Each client holds a batch, and there is always another.
    ready = max(plan.ready, 4 * plan.batch * max(plan.limit_clients))
    add_checkpoints(url, [subscription], max(plan.grown_total, ready), ready=ready)
    vacuum(url)
    return url


def _bare(server: Server, plan: Plan) -> str:
    url = server.create(None)
    with connect(url) as connection:
        connection.execute((SQL / "two_tables" / "create.sql").read_bytes())
        connection.execute(
            "INSERT INTO two_tables.ready SELECT n, now() FROM generate_series(1, %s) AS n",
            (max(plan.ready, 4 * plan.batch * max(plan.limit_clients)),),
        )
    vacuum(url)
    return url
