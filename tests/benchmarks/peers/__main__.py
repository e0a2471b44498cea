"""Try the peers alone, each figure from a fresh database of a durable throw-away server."""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable

from checkpoints.embedded import EmbeddedServer, start_server
from tests.benchmarks.peers import PEERS, NotAllDone, Peer, PeerError
from tests.benchmarks.peers.workers import connect

# More than any peer does, one at a time, with one process on one connection.
_FASTEST_SINGLE = 3_000

_numbers = itertools.count(1)


def main() -> None:
    """Print a line for each figure; what fails is said and the next peer tried."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.peers", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a part of a name; none: all")
    parser.add_argument("--count", type=int, default=50_000, help="items to drain")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--foreign", type=int, default=0, help="items of another queue")
    parser.add_argument("--paused", type=int, default=0, help="items that are paused")
    parser.add_argument("--seconds", type=float, default=5.0, help="one at a time; 0: not at all")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of a drain")
    given = parser.parse_args()

    names = [name.lower() for name in given.names] or [""]
    chosen = [peer for peer in PEERS if any(name in peer.name.lower() for name in names)]
    if not chosen:
        parser.error(f"{given.names} is in none of {[peer.name for peer in PEERS]}")
    with start_server(durable=True, settings={"max_connections": "300"}) as server:
        print(server.description)
        for peer in chosen:
            if why := peer.missing():
                print(f"{peer.name}: cannot run: {why}")
                continue
            print(f"{peer.name} {peer.version()}")
            try:
                filled = functools.partial(_filled, server, peer, given.foreign, given.paused)
                _measure(peer, filled, given)
            except PeerError as error:
                print(f"  {error}")


def _measure(peer: Peer, filled: Callable[[int], str], given: argparse.Namespace) -> None:
    for processes in given.processes:
        what = f"drain {given.count:,}, {processes} processes"
        url = filled(given.count)
        try:
            seconds, done = (
                peer.limited(given.limit).drain(url, given.count, processes, given.batch),
                given.count,
            )
        except NotAllDone as error:
            seconds, done, what = error.seconds, error.done, f"{what}, only {error.done:,} done"
        print(f"  {what}: {seconds:.2f} s, {done / seconds:,.0f}/s", flush=True)
    if given.seconds:
        for processes in given.processes:
            url = filled(round((given.seconds + 2) * _FASTEST_SINGLE * processes))
            rate = peer.one_at_a_time(url, given.seconds, processes)
            print(f"  one at a time, {processes} processes: {rate:,.0f}/s", flush=True)


def _filled(server: EmbeddedServer, peer: Peer, foreign: int, paused: int, work: int) -> str:
    """A new database with the peer's schema; the items to be done come last."""
    name = f"peer_{next(_numbers)}"
    with connect(server.url().render_as_string(hide_password=False)) as connection:
        connection.execute(f'CREATE DATABASE "{name}"'.encode())
    url = server.url(name).render_as_string(hide_password=False)
    peer.prepare(url)
    if foreign:
        peer.add(url, foreign, "foreign")
    if paused:
        peer.add(url, paused, "paused")
    peer.add(url, work, "work")
    return url


if __name__ == "__main__":
    main()
