"""A client process: takes jobs from standard input, as lines of JSON, until that ends.

For each job it connects and says `ready`; is told when to begin and end, by the clock that all
processes of a machine share; does the work; and says what it has done.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from typing import Any

from tests.benchmarks.work import Job, Step, step_of


def main() -> None:
    """Serve jobs until the end of standard input."""
    for line in sys.stdin:
        try:
            _serve(json.loads(line))
        except Exception:
            _say({"error": traceback.format_exc()})


def _serve(job: Job) -> None:
    with step_of(job) as step:
        _say({"ready": True})
        told = json.loads(sys.stdin.readline())
        _sleep_until(told["start"])
        match told["measure"]:
            case "rate":
                _say(_rate(step, told["start"] + told["warm_up"], told["seconds"]))
            case "drain":
                _say(_drain(step, told["start"] + told["limit"]))
            case "calls":
                for _ in range(told["warm_up"]):
                    step()
                _say({"samples": [step() for _ in range(told["calls"])]})


def _rate(step: Step, begin: float, seconds: float) -> dict[str, Any]:
    """Work for so long after the warm-up; the time is that of whole steps."""
    while time.monotonic() < begin:
        step()
    begun = now = time.monotonic()
    done = steps = empty = 0
    # The end is fixed, so that all clients load the server for as long as any of them counts.
    while now < begin + seconds or not steps:
        moved = step()
        done += moved
        steps += 1
        empty += moved == 0
        now = time.monotonic()
    return {"done": done, "steps": steps, "empty": empty, "seconds": now - begun}


def _drain(step: Step, until: float) -> dict[str, Any]:
    """Work until there is nothing, or it is late; when the last was done, by the common clock."""
    done = 0
    ended = time.monotonic()
    while ended < until and (moved := step()):
        done += moved
        ended = time.monotonic()
    return {"done": done, "ended": ended}


def _sleep_until(start: float) -> None:
    if (seconds := start - time.monotonic()) > 0:
        time.sleep(seconds)


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
