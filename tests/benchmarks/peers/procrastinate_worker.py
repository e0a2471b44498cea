"""A worker of Procrastinate: `python -m tests.benchmarks.peers.procrastinate_worker CONCURRENCY`.

`app` is also what its command line is given, to install the schema.
"""

from __future__ import annotations

import asyncio
import sys

from procrastinate import App, PsycopgConnector

from tests.benchmarks.peers.procrastinate import QUEUE, TASK
from tests.benchmarks.peers.worker import Reporter

# Where to is in libpq's variables.
app = App(connector=PsycopgConnector())


async def _main(concurrency: int) -> None:
    reporter = Reporter()
    size = concurrency + 1
    working = App(connector=PsycopgConnector(min_size=size, max_size=size))

    async def handle() -> None:
        reporter.handled += 1

    working.task(name=TASK, queue=QUEUE)(handle)
    async with working.open_async():
        await reporter.ready()
        await working.run_worker_async(queues=[QUEUE], concurrency=concurrency)


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1])))
