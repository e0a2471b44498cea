"""Load: tables filled in bulk, and client processes that work on them at the same time."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from tests.benchmarks.texts import GROUP
from tests.benchmarks.work import Job, connect

__all__ = [
    "FAR",
    "ClientFailed",
    "Clients",
    "Drained",
    "add_checkpoints",
    "add_subscription",
    "vacuum",
]

FAR = 1_000_000_000
"""A version that no position reaches: after each cycle the checkpoint is ready again."""

_ROOT = Path(__file__).parents[2]
_LONGEST = 900.0


class ClientFailed(Exception):
    """A client process failed; says what it said."""


@dataclass(frozen=True)
class Drained:
    """How long a drain took, from its start to the last item done, and how many were done."""

    seconds: float
    done: int


def add_subscription(
    url: str, name: str, *, group: str = GROUP, status: str = "active", count: int = 1
) -> list[int]:
    """Add subscriptions to a group, which is made if need be; their ids."""
    with connect(url) as connection:
        connection.execute(
            "INSERT INTO checkpoints.subscription_groups (name) VALUES (%s) ON CONFLICT DO NOTHING",
            (group,),
        )
        rows = connection.execute(
            "INSERT INTO checkpoints.subscriptions (subscription_group_id, name, status)"
            " SELECT id, %s::text || '-' || n, %s::checkpoints.subscription_status"
            " FROM checkpoints.subscription_groups, generate_series(1, %s) AS n WHERE name = %s"
            " RETURNING id",
            (name, status, count, group),
        ).fetchall()
    return [row[0] for row in rows]


def add_checkpoints(
    url: str,
    subscription_ids: Sequence[int],
    count: int,
    *,
    ready: int,
    version: int = FAR,
    due: str = "-1 hour",
    first: int = 1,
) -> None:
    """Add `count` checkpoints to the subscriptions in turn, `ready` of them with work.

    Those with work are spread over the table; each is due an interval `due` from now, and a
    microsecond after the one before. The triggers do the rest, without notifying.
    """
    with connect(url) as connection, connection.transaction():
        connection.execute("SET LOCAL checkpoints.notify = off")
        connection.execute(
            """
            INSERT INTO checkpoints.checkpoints
              (subscription_id, stream_name, stream_version, stream_position, process_at)
            SELECT (%(ids)s::bigint[])[1 + mod(rank, %(subscriptions)s)], 'stream-' || n,
              CASE WHEN lags THEN %(version)s ELSE 1 END, CASE WHEN lags THEN 0 ELSE 1 END,
              CASE WHEN lags THEN now() + %(due)s::interval + n * interval '1 microsecond' END
            FROM generate_series(%(first)s::bigint, %(last)s::bigint) AS n
            CROSS JOIN LATERAL (
              SELECT (n - %(first)s) * %(ready)s / %(count)s AS rank,
                (n - %(first)s + 1) * %(ready)s / %(count)s
                > (n - %(first)s) * %(ready)s / %(count)s AS lags
            ) AS choice
            """,
            {
                "ids": list(subscription_ids),
                "subscriptions": len(subscription_ids),
                "version": version,
                "due": due,
                "first": first,
                "last": first + count - 1,
                "ready": ready,
                "count": count,
            },
        )


def vacuum(url: str) -> None:
    """Have the planner know the tables, and no page be new."""
    with connect(url) as connection:
        connection.execute("VACUUM ANALYZE")


class _Process:
    """A client process."""

    def __init__(self) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - `close` closes it
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.client"],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout

    def tell(self, what: object) -> None:
        self._in.write(json.dumps(what) + "\n")
        self._in.flush()

    def hear(self) -> dict[str, Any]:
        line = self._out.readline()
        if not line:
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace")[-2000:]
            raise ClientFailed(f"a client ended with {self._process.wait(10)}: {said}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ClientFailed(f"a client failed:\n{answer['error']}")
        return answer

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._in.close()
        self._out.close()
        self._errors.close()


class Clients:
    """Client processes, started when first needed and kept; as a context manager it ends them."""

    def __init__(self) -> None:
        self._processes: list[_Process] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        while self._processes:
            self._processes.pop().close()

    def rate(self, job: Job, clients: int, *, seconds: float, warm_up: float) -> float:
        """Checkpoints/s of all clients together, each counting what it moved.

        Raises:
            ClientFailed: One failed, or none of them found anything to do.
        """
        told = {"measure": "rate", "seconds": seconds, "warm_up": warm_up}
        _, answers = self._run(job, clients, told)
        done: float = sum(answer["done"] / answer["seconds"] for answer in answers)
        if not done:
            raise ClientFailed(f"{clients} clients found nothing to do: {job!r}")
        return done

    def drain(self, job: Job, clients: int, *, limit: float = _LONGEST) -> Drained:
        """Work until nothing is left, or for so many seconds."""
        told = {"measure": "drain", "limit": limit}
        start, answers = self._run(job | {"seconds": limit}, clients, told)
        ended = max(answer["ended"] for answer in answers)
        return Drained(ended - start, sum(answer["done"] for answer in answers))

    def calls(self, job: Job, calls: int, *, warm_up: int) -> list[int]:
        """What one client's steps answer, one by one."""
        told = {"measure": "calls", "calls": calls, "warm_up": warm_up}
        _, answers = self._run(job, 1, told)
        samples: list[int] = answers[0]["samples"]
        return samples

    def _run(
        self, job: Job, clients: int, told: dict[str, Any]
    ) -> tuple[float, list[dict[str, Any]]]:
        while len(self._processes) < clients:
            self._processes.append(_Process())
        chosen = self._processes[:clients]
        # What hangs is ended: a pipe that closes is an error.
        watch = threading.Timer(_LONGEST, _kill, (chosen,))
        watch.start()
        try:
            for process in chosen:
                process.tell(job)
            for process in chosen:
                process.hear()
            start = time.monotonic() + 0.02
            for process in chosen:
                process.tell(told | {"start": start})
            return start, [process.hear() for process in chosen]
        except ClientFailed:
            # The others are in the middle of something.
            self.__exit__(None, None, None)
            raise
        finally:
            watch.cancel()


def _kill(processes: Sequence[_Process]) -> None:
    for process in processes:
        process.kill()
