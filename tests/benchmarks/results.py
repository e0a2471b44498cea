"""What was measured, and on what, as JSON that another run can be compared with."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tests.benchmarks.rounds import ratio, summary
from tests.benchmarks.server import Server

__all__ = ["Results", "Say", "Series", "environment", "read", "write"]

Say = Callable[[str], None]

_PACKAGES = ("checkpoints", "sqlalchemy", "psycopg", "psycopg-binary", "alembic")
_SETTINGS = (
    "fsync",
    "synchronous_commit",
    "full_page_writes",
    "shared_buffers",
    "max_wal_size",
    "checkpoint_timeout",
    "wal_sync_method",
    "autovacuum",
)
_ROOT = Path(__file__).parents[2]


@dataclass
class Series:
    """Contestants measured in the same rounds: a sample of each for each round."""

    part: str
    title: str
    unit: str
    base: str
    """Whom the ratios are to."""
    samples: dict[str, list[float]]
    axis: str | None = None
    """What grows, where the contestants are sizes of it."""
    more_is_better: bool = True
    missing: dict[str, str] = field(default_factory=dict)
    """Who could not be measured, and why."""

    def summarised(self) -> dict[str, Any]:
        """The statistics of each contestant."""
        base = self.samples.get(self.base)
        return {
            name: asdict(summary(samples))
            | ({"ratio": asdict(ratio(samples, base))} if base else {"ratio": None})
            for name, samples in self.samples.items()
        }


@dataclass
class Results:
    """A run."""

    environment: dict[str, Any]
    series: list[Series]


def write(results: Results, file: Path) -> None:
    """Write a run, with the statistics beside the samples."""
    given = {
        "environment": results.environment,
        "series": [asdict(series) | {"summary": series.summarised()} for series in results.series],
    }
    file.write_text(json.dumps(given, indent=1, ensure_ascii=False) + "\n")


def read(file: Path) -> Results:
    """Read what `write` wrote; the statistics are made again."""
    given = json.loads(file.read_text())
    series = [
        Series(**{key: value for key, value in each.items() if key != "summary"})
        for each in given["series"]
    ]
    return Results(given["environment"], series)


def environment(server: Server, plan: str, rounds: int) -> dict[str, Any]:
    """On what it was measured."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "plan": plan,
        "rounds": rounds,
        "revision": _revision(),
        "postgresql": server.show("server_version"),
        "settings": {name: server.show(name) for name in _SETTINGS},
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "node": _said("node", "--version"),
        "pgbench": server.pgbench and _said(server.pgbench, "--version"),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "cpu": _cpu(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _said(program: str, *arguments: str) -> str | None:
    if shutil.which(program) is None:
        return None
    try:
        done = subprocess.run(
            [program, *arguments],
            cwd=_ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _revision() -> str | None:
    """The commit, and whether something differs from it."""
    commit = _said("git", "rev-parse", "--short=12", "HEAD")
    changed = commit and _said("git", "status", "--porcelain", "--", "checkpoints", "alembic")
    return f"{commit} with changes" if changed else commit


def _cpu() -> str:
    """The processor's name, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
