"""Other queues on PostgreSQL, driven as their own documentation recommends.

Each is a `Peer`: it installs its own schema into a fresh database, takes items, and works them
off in processes of its own, timed from outside. Items are no-ops: what is compared is the queue.

    python -m tests.benchmarks.peers [NAME ...] --count 50000 --processes 1 4
"""

from __future__ import annotations

from tests.benchmarks.peers.graphile import GraphileWorker
from tests.benchmarks.peers.peer import Kind, NotAllDone, Peer, PeerError
from tests.benchmarks.peers.pgqueuer import PgQueuer
from tests.benchmarks.peers.procrastinate import Procrastinate

__all__ = ["PEERS", "Kind", "NotAllDone", "Peer", "PeerError"]

PEERS: tuple[Peer, ...] = (
    PgQueuer("asyncpg"),
    PgQueuer("psycopg"),
    Procrastinate(),
    GraphileWorker(local_queue=False),
    GraphileWorker(local_queue=True),
)
