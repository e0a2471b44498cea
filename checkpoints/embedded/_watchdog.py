"""Keeps one throw-away server: runs its commands, and removes it when its parent is gone.

A stand-alone script in a session of its own, started with the path, `-I -S` and a JSON object;
it outlives a killed parent and nothing else. Only this process starts, stops and removes, so
nothing is half done when the parent dies during a start, and there is one way to clean up.

It makes the server's folder and answers that like a request. Then it reads requests from its
standard input, a line of JSON each: a command to run, answered by a line with its exit status
and its output; or "stop". The end of the input means that the parent died: a server without a
parent has nobody to wait for, and is stopped the quick way.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any


def main(folder: str, bin: str, parent: int, user: tuple[int, int] | None) -> int:
    """Serve until the parent says stop or is gone; return 0 when nothing is left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A handler, not SIG_IGN: what is ignored stays ignored in the server and its programs.
        signal.signal(number, lambda *_: None)

    def run(command: list[str]) -> tuple[int, str]:
        identity: dict[str, Any] = {}
        if user is not None:
            identity = {"user": user[0], "group": user[1], "extra_groups": []}
        try:
            done = subprocess.run(  # noqa: S603 - the parent's own commands
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                check=False,
                cwd=folder,
                errors="replace",
                **identity,
            )
        except (OSError, subprocess.SubprocessError) as error:
            return -1, str(error)
        return done.returncode, done.stdout

    try:
        os.mkdir(folder, 0o700)
    except OSError as error:
        _answer(-1, str(error))
        return 1
    try:
        if user is not None:
            os.chown(folder, *user)
    except OSError as error:
        _answer(-1, str(error))
    else:
        _answer(0, "")
    mode = _serve(run, parent)
    data = os.path.join(folder, "data")
    if os.path.exists(os.path.join(data, "postmaster.pid")):
        stop = [os.path.join(bin, "pg_ctl"), "stop", "-D", data, "-w", "-t", "30", "-m"]
        if run([*stop, mode])[0] and mode != "immediate":
            run([*stop, "immediate"])
    # Should stopping fail all the same: a postmaster without its folder ends within a minute.
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.lexists(folder):
            return 0
        time.sleep(0.1)
    return 1


def _serve(run: Callable[[list[str]], tuple[int, str]], parent: int) -> str:
    """Answer requests; return the mode in which the server is to be stopped."""
    # Unbuffered, or select() would not see a line that was read ahead.
    with open(0, "rb", buffering=0, closefd=False) as requests:
        # A forked child of the parent holds the pipe's other end too, so the pipe's end alone
        # does not tell that the parent is gone.
        while os.getppid() == parent:
            if not select.select([requests], [], [], 1)[0]:
                continue
            line = requests.readline()
            if not line.endswith(b"\n"):
                break
            request = json.loads(line)
            if request == "stop":
                return "fast"
            _answer(*run(request))
    return "immediate"


def _answer(status: int, output: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        # Short enough for the pipe to take it whole.
        os.write(1, json.dumps([status, output[-3000:]]).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main(**json.loads(sys.argv[1])))
