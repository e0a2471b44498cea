"""The peers do what they are timed for; Graphile Worker, which needs node, only says so here."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from sqlalchemy import URL, make_url

from tests.benchmarks.peers import PEERS, NotAllDone, Peer, PeerError
from tests.benchmarks.peers.graphile import GraphileWorker
from tests.benchmarks.peers.pgqueuer import PgQueuer
from tests.benchmarks.peers.procrastinate import Procrastinate
from tests.benchmarks.peers.workers import connect, environment, started

IN_PYTHON: list[Peer] = [PgQueuer("asyncpg"), PgQueuer("psycopg"), Procrastinate()]
ON_NODE: list[Peer] = [GraphileWorker(local_queue=False), GraphileWorker(local_queue=True)]

# It is ready, then "handles" as many items as its process's number, and never ends of itself.
ENDLESS = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
print(os.getpid(), flush=True)
while True:
    time.sleep(60)
"""


@pytest.fixture
def url(database_url: URL) -> str:
    return database_url.render_as_string(hide_password=False)


def statuses(url: str, peer: Peer) -> dict[tuple[str, str], int]:
    """How many items of which queue stand how."""
    table, queue = (
        ("pgqueuer", "entrypoint")
        if isinstance(peer, PgQueuer)
        else ("procrastinate_jobs", "queue_name")
    )
    with connect(url) as connection:
        rows = connection.execute(
            f"SELECT {queue}, status::text, count(*) FROM {table} GROUP BY 1, 2".encode()
        ).fetchall()
    return {(queue, status): count for queue, status, count in rows}


def test_each_peer_is_listed_once_under_its_own_name() -> None:
    assert len({peer.name for peer in PEERS}) == len(PEERS)
    assert list(PEERS) == IN_PYTHON + ON_NODE


@pytest.mark.parametrize("peer", IN_PYTHON, ids=lambda peer: peer.name)
def test_a_drain_does_all_work_and_leaves_foreign_and_paused_items(peer: Peer, url: str) -> None:
    assert peer.missing() is None
    assert peer.version()[0].isdecimal()
    peer.prepare(url)
    peer.add(url, 30, "foreign")
    peer.add(url, 20, "paused")
    waiting = statuses(url, peer)
    peer.add(url, 200, "work")

    assert peer.drain(url, 200, processes=2, batch=10) > 0

    done = {("work", "succeeded"): 200} if isinstance(peer, Procrastinate) else {}
    assert sorted(waiting.values()) == [20, 30]
    assert statuses(url, peer) == waiting | done


@pytest.mark.parametrize("peer", IN_PYTHON, ids=lambda peer: peer.name)
def test_one_at_a_time_is_a_rate_of_what_the_database_says_was_done(peer: Peer, url: str) -> None:
    peer.prepare(url)
    peer.add(url, 10_000, "work")

    assert 1 < peer.one_at_a_time(url, seconds=1.5, processes=1) < 10_000 / 1.5


def test_one_at_a_time_without_enough_items_is_no_rate(url: str) -> None:
    peer = Procrastinate()
    peer.prepare(url)
    with pytest.raises(PeerError, match="no work item waits"):
        peer.one_at_a_time(url, seconds=0.1, processes=1)
    peer.add(url, 5, "work")
    with pytest.raises(PeerError, match="5 items are not enough"):
        peer.one_at_a_time(url, seconds=0.1, processes=1)


def test_a_drain_that_takes_too_long_says_how_much_was_done(url: str) -> None:
    peer = Procrastinate().limited(0.5)
    peer.prepare(url)
    peer.add(url, 20_000, "work")

    with pytest.raises(NotAllDone, match=r"the limit is 0\.5 s") as raised:
        peer.drain(url, 20_000, processes=1, batch=1)

    assert raised.value.count == 20_000
    assert raised.value.done == statuses(url, peer).get(("work", "succeeded"), 0) < 20_000
    assert raised.value.seconds >= 0.5


def test_a_drain_wants_the_number_of_items_that_wait(url: str) -> None:
    peer = PgQueuer("psycopg")
    peer.prepare(url)
    peer.add(url, 3, "work")
    with pytest.raises(PeerError, match="3 work items wait, not 4"):
        peer.drain(url, 4, processes=1, batch=1)


def test_an_error_leaves_no_worker(url: str) -> None:
    pids = []

    def fail() -> None:
        with started((sys.executable, "-c", ENDLESS), environment(url), 1) as workers:
            while workers.handled == 0:
                workers.listen(1.0)
            pids.append(workers.handled)
            os.kill(pids[0], 0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_a_worker_that_ends_is_an_error_with_what_it_said(url: str) -> None:
    command = (sys.executable, "-c", "raise SystemExit('no such thing')")
    with (
        pytest.raises(PeerError, match="ended with 1 before it was to: no such thing"),
        started(command, environment(url), 2),
    ):
        pass


def test_no_setting_of_this_environment_reaches_a_worker(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGOPTIONS", "-c synchronous_commit=off")
    monkeypatch.setenv("PGQUEUER_DURABILITY", "volatile")
    made = environment(url)
    assert not {"PGOPTIONS", "PGQUEUER_DURABILITY"} & set(made)
    assert made["PGDATABASE"] == make_url(url).database


@pytest.mark.parametrize("peer", ON_NODE, ids=lambda peer: peer.name)
def test_without_node_a_peer_on_node_is_missing(
    peer: Peer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert peer.missing() == "node is not on the PATH"


def test_an_old_node_is_not_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for program in ("node", "npm"):
        made = tmp_path / program
        made.write_text("#!/bin/sh\necho v18.19.0\n")
        made.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ON_NODE[0].missing() == "node is v18.19.0, and 20 or newer is needed"
