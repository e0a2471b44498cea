"""Worker processes: started, killed, frozen and asked to stop by the tests."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from sqlalchemy import URL

from tests.faults import shifted, worker
from tests.faults.waiting import eventually
from tests.faults.worker import Job

__all__ = ["Workers"]

# A process that has imported all and has neither threads nor connections forks the workers: one
# that is killed is replaced within milliseconds.
_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload(["tests.faults.worker"])
# One that has imported nothing yet.
_spawn = multiprocessing.get_context("spawn")

SHORT = {
    "listen": True,
    "poll_interval": timedelta(seconds=0.2),
    "recover_interval": timedelta(seconds=0.2),
    "reservation_timeout": timedelta(seconds=2),
}


class Workers:
    """Worker processes by name; each has a log of its own, over all its lives."""

    def __init__(self, url: URL, folder: Path) -> None:
        self.folder = folder
        self._url = url
        self._processes: dict[str, BaseProcess] = {}
        self._jobs: dict[str, dict[str, Any]] = {}
        self._shifts: dict[str, float] = {}

    @property
    def names(self) -> list[str]:
        """All names, of those that ended, too."""
        return list(self._jobs)

    def start(self, name: str, *, shift: float = 0, **job: Any) -> None:
        """Start one; `consumer` is merged into short intervals and timeouts.

        `shift`: by how many seconds its clock is ahead.
        """
        job["consumer"] = {**SHORT, **job.get("consumer", {})}
        self._jobs[name] = {
            "url": self._url,
            "log": str(self.folder / f"{name}.log"),
            "name": name,
            **job,
        }
        self._shifts[name] = shift
        self.restart(name)

    def restart(self, name: str) -> None:
        """Start one again that has ended."""
        job, shift = self._jobs[name], self._shifts[name]
        process: BaseProcess
        if shift:
            process = _spawn.Process(target=shifted.run, args=(shift, job), daemon=True)
        else:
            process = _forkserver.Process(target=worker.run, args=(Job(**job),), daemon=True)
        process.start()
        self._processes[name] = process

    def kill(self, name: str) -> None:
        """Kill one with SIGKILL."""
        process = self._processes[name]
        process.kill()
        process.join(10)

    def freeze(self, name: str) -> None:
        """Stop one where it stands, as a machine that swaps or hangs does; return when it does."""
        self.signal(name, signal.SIGSTOP)
        stat = Path(f"/proc/{self._processes[name].pid}/stat")
        if stat.exists():
            eventually(
                lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", f"{name} stands"
            )

    def thaw(self, name: str) -> None:
        """Let one go on as if nothing had happened."""
        self.signal(name, signal.SIGCONT)

    def terminate(self, name: str) -> None:
        """Ask one to stop."""
        self.signal(name, signal.SIGTERM)

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal."""
        pid = self._processes[name].pid
        assert pid is not None
        os.kill(pid, number)

    def check(self) -> None:
        """None has ended by an error of its own."""
        for name, process in self._processes.items():
            assert process.exitcode != 1, f"{name} ended by itself; see its traceback"

    def exit_code(self, name: str) -> int | None:
        """None while it lives."""
        return self._processes[name].exitcode

    def await_exit(self, name: str, seconds: float) -> int | None:
        """Its exit code; None: it lives on."""
        self._processes[name].join(seconds)
        return self.exit_code(name)

    def log(self, name: str | None = None) -> list[dict[str, Any]]:
        """What one has logged, or all."""
        paths = [self.folder / f"{each}.log" for each in ([name] if name else self.names)]
        # The last line may be cut off, where its writer was killed.
        return [
            json.loads(line)
            for path in paths
            if path.exists()
            for line in path.read_text().splitlines()
            if line.endswith("}")
        ]

    def told(self, words: str, name: str | None = None) -> list[dict[str, Any]]:
        """The records that have these words."""
        return [record for record in self.log(name) if words in record["message"]]

    def failed_attempts(self) -> list[dict[str, Any]]:
        """The records of handlers that raised, or took too long."""
        return [record for record in self.log() if record["message"].startswith("attempt ")]

    def sqlstates(self) -> list[str | None]:
        """Of all statements that failed."""
        return [record["sqlstate"] for record in self.told("a statement failed")]

    def close(self) -> None:
        """Kill all."""
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.join(10)
