"""The versions that the library says it runs on: `nox -f tests/noxfile.py` runs all of them.

An interpreter that is missing is an error. To do without one, name those that are to be used:
`nox -f tests/noxfile.py --python 3.11 3.12`. What follows `--` is given to pytest, such as the
tests that are to be run.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import nox

ROOT = Path(__file__).parents[1]
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = "asyncio,demo,testing"
TOOLS = (
    "build",
    "hatchling",
    "hypothesis",
    "mypy",
    "opentelemetry-sdk",
    "pytest-timeout",
    "pytest-xdist",
    "pyyaml",
    "ruff",
    "sybil",
)

# The faults, the demonstration and the pages are of processes and of this project's tools.
TESTS = (
    "tests/statements",
    "tests/rule",
    "tests/concurrency",
    "tests/runtime",
    "tests/migrations",
    "tests/testing",
    "tests/test_arguments.py",
    "tests/test_executing.py",
)
# Those of the migrations take as long as all others.
PART = tuple(test for test in TESTS if test != "tests/migrations")

# Wheels of psycopg-binary came after the release that is the oldest allowed.
FIRST_BINARY = {(3, 13): "3.2.2", (3, 14): "3.2.10"}

# The servers, which are listed from the oldest on.
OLDEST, NEWEST = 0, -1

nox.options.envdir = str(ROOT / ".nox")
nox.options.error_on_missing_interpreters = True
nox.options.sessions = ["tests"]


def oldest(python: tuple[int, int]) -> list[str]:
    """The lower bounds of what the library itself needs, as versions."""
    needed = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["binary"]]
    versions = {}
    for requirement in needed:
        found = re.fullmatch(r"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)", requirement)
        if found is None:
            raise ValueError(f"expected a requirement such as name>=1.2, not {requirement!r}")
        versions[found[1]] = found[2]
    versions["psycopg"] = FIRST_BINARY.get(python, versions["psycopg"])
    versions["psycopg-binary"] = versions["psycopg"]
    return [f"{name}=={version}" for name, version in versions.items()]


def run(session: nox.Session, dependencies: str, tests: tuple[str, ...], *ends: int) -> None:
    """Install, say what is installed, and run the tests on the servers at these ends."""
    session.chdir(ROOT)
    # The interpreter that runs this may be given by a path.
    python: str = session.run(
        "python", "-c", "import sys; print(*sys.version_info[:2])", silent=True, log=False
    )  # type: ignore[assignment]  # a text, when it is silent
    major, minor = map(int, python.split())
    tools = [
        requirement
        for requirement in PROJECT["optional-dependencies"]["dev"]
        if re.split(r"[>=\[]", requirement)[0] in TOOLS
    ]
    versions = oldest((major, minor)) if dependencies == "oldest" else []
    options = [] if versions else ["--upgrade", "--upgrade-strategy", "eager"]
    session.install(*options, "-e", f".[{EXTRAS}]", *tools)
    if versions:
        # The extra of psycopg 3.2.0 asks for a psycopg-binary that was never released.
        session.install("--no-deps", *versions)
    session.run(
        "python",
        "-c",
        "import sys, importlib.metadata as m;"
        "print('Python', sys.version.split()[0],"
        " *(f'{n} {m.version(n)}' for n in ('sqlalchemy', 'alembic', 'psycopg')))",
    )
    found: str = session.run(
        "python",
        "-c",
        "from checkpoints.embedded import available_majors as a; print(a())",
        silent=True,
        log=False,
    )  # type: ignore[assignment]
    majors: list[int] = json.loads(found)
    chosen = session.posargs or ("-n", "2", *tests)
    for server in sorted({majors[end] for end in ends}):
        session.run("pytest", "-q", "--postgres-major", str(server), *chosen)


@nox.session(python=PYTHONS)
@nox.parametrize("dependencies", ["newest", "oldest"], ids=["newest", "oldest"])
def tests(session: nox.Session, dependencies: str) -> None:
    """One version of Python, with the newest or the oldest dependencies that are allowed."""
    run(session, dependencies, TESTS, OLDEST, NEWEST)


@nox.session
def oldest_dependencies(session: nox.Session) -> None:
    """A part, for `.ci/run`: the oldest dependencies, on the newest server and this Python."""
    run(session, "oldest", PART, NEWEST)
