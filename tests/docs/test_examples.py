"""Every code block of the documentation is run, in order, on a database of its page."""

from __future__ import annotations

import configparser
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import URL, Engine, create_engine, func, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from sybil import Example
from sybil.evaluators.python import PythonEvaluator

from checkpoints import audit_checkpoints
from checkpoints.tables import DEFAULT_SCHEMA
from tests.docs.pages import PAGES, ROOT, examples, language
from tests.support.databases import Databases, disposed

EXAMPLES = ROOT / "docs" / "examples"
BIN = Path(sys.executable).parent

# What .ci/run runs itself, on a machine that has nothing yet.
RUN = "python3 -m venv .venv && .venv/bin/pip install -q -e '.[demo]' && .venv/bin/checkpoints demo"
TESTS = "python3 -m venv .venv && .venv/bin/pip install -q -e '.[dev]' && .venv/bin/pytest -n 2"

# These pages make the schema themselves; the others find it.
IN_AN_APPLICATION = "docs/how-to/add-to-an-existing-application.md"
# These write files, not into the root of the clone.
IN_A_FOLDER = {IN_AN_APPLICATION, "docs/how-to/test-your-handlers.md"}
ON_AN_EMPTY_DATABASE = {
    "README.md",
    "docs/how-to/migrate.md",
    "docs/tutorial.md",
    IN_AN_APPLICATION,
}
# In these, a block of text after one that prints is what it prints.
WITH_OUTPUT = {"docs/tutorial.md", "docs/how-to/monitor.md"}
# Their SQL has the placeholders of the driver.
RENDERINGS = {"docs/reference/statements.md"}
# Roles belong to the server: this page does not make the one that it grants something.
WITH_A_ROLE = "docs/how-to/migrate.md"
ROLE = "application"


@pytest.fixture
def environment(
    databases: Databases, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[URL]:
    """A database for a page or a script, and its URL in DATABASE_URL."""
    empty = getattr(request, "param", None) in ON_AN_EMPTY_DATABASE
    url = databases.create() if empty else databases.create_migrated()
    monkeypatch.setenv("DATABASE_URL", url.render_as_string(hide_password=False))
    monkeypatch.setenv("PATH", str(BIN), prepend=os.pathsep)
    monkeypatch.syspath_prepend(EXAMPLES)
    yield url
    databases.drop(url)


@pytest.fixture
def role(databases: Databases, page: str) -> Iterator[None]:
    """The role of an application, for the page that grants it something."""
    if page != WITH_A_ROLE:
        yield
        return
    engine = create_engine(databases.url("postgres"), isolation_level="AUTOCOMMIT")
    with disposed(engine), engine.connect() as connection:
        # Another run may be making or using it.
        with contextlib.suppress(DBAPIError):
            connection.exec_driver_sql(f"CREATE ROLE {ROLE}")
        yield
        with contextlib.suppress(DBAPIError):
            connection.exec_driver_sql(f"DROP ROLE {ROLE}")


def run_sql(url: URL, source: str) -> None:
    """Run statements, in one transaction, as psql would."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with disposed(engine), engine.connect() as connection:
        cursor = connection.connection.cursor()
        cursor.execute(source)
        cursor.close()


def run_shell(source: str, folder: Path) -> None:
    """Run commands in a folder."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", source],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{source}\n{done.stdout}"


def run_python(page: str, example: Example) -> None:
    """Run a block; what it prints must stand in the next one, on pages that show it."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        PythonEvaluator()(example)
    if page in WITH_OUTPUT and printed.getvalue():
        blocks = list(examples(ROOT / page, lambda _: None))
        following = blocks[[block.line for block in blocks].index(example.line) + 1]
        assert language(following) == "text"
        assert str(following.parsed) == printed.getvalue(), f"{page}, line {following.line}"


def run_example(url: URL, page: str, folder: Path, example: Example) -> None:
    """Run a code block, as its language has it."""
    source: str = str(example.parsed)
    match language(example):
        case "python":
            run_python(page, example)
        case "sh":
            if source.strip() not in {RUN, TESTS}:
                run_shell(source, folder)
        case "sql":
            if page not in RENDERINGS:
                run_sql(url, source)
        case "ini":
            configparser.ConfigParser(interpolation=None).read_string(source)
        case "toml":
            tomllib.loads(source)
        case "yaml":
            assert all(yaml.safe_load_all(source))
        case "dockerfile":
            check_dockerfile(source)
        case "text":
            pass
        case directive if directive.startswith("{"):
            # For the site only, which .ci/run builds.
            pass
        case other:
            pytest.fail(f"{page}, line {example.line}: no tests know how to run {other!r}")


def check_dockerfile(source: str) -> None:
    """There is no daemon to build it; but signals reach the process of an exec form only."""
    instructions = dict(line.split(" ", 1) for line in source.splitlines() if line)
    assert set(instructions) <= {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "CMD"}
    assert json.loads(instructions["CMD"])


def dispose(value: object) -> None:
    """Close the connections of an engine that a page has made."""
    if isinstance(value, AsyncEngine):
        value = value.sync_engine
    if isinstance(value, Engine):
        value.dispose()


def violations(url: URL) -> list[Any]:
    """What breaks the rule in the schema, should there be one."""
    engine = create_engine(url)
    with disposed(engine), engine.connect() as connection:
        if not engine.dialect.has_table(connection, "checkpoints_ready", schema=DEFAULT_SCHEMA):
            return []
        return list(connection.execute(audit_checkpoints()).all())


@pytest.mark.parametrize(
    ("environment", "page"), [(p, p) for p in PAGES], indirect=["environment"], ids=PAGES
)
@pytest.mark.usefixtures("role")
def test_examples_run(environment: URL, page: str, tmp_path: Path) -> None:
    namespace: dict[str, Any] = {}
    folder = tmp_path if page in IN_A_FOLDER else ROOT
    run = partial(run_example, environment, page, folder)
    try:
        for example in examples(ROOT / page, run):
            namespace = example.namespace
            example.evaluate()
    finally:
        for value in namespace.values():
            dispose(value)
    assert violations(environment) == []


@pytest.mark.parametrize(
    ("environment", "page"),
    [(page, page) for page in ("README.md", "docs/tutorial.md")],
    indirect=["environment"],
)
def test_the_page_is_one_file(environment: URL, page: str, tmp_path: Path) -> None:
    blocks = examples(ROOT / page, lambda _: None)
    parts = [str(block.parsed) for block in blocks if language(block) == "python"]
    assert len(parts) > 1
    file = tmp_path / "quickstart.py"
    file.write_text("\n".join(parts))
    run_script(file)
    assert violations(environment) == []


def test_readme_says_the_two_commands_that_ci_runs() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert RUN in lines
    # .ci/run takes the first line that names pytest.
    assert next(line for line in lines if ".venv/bin/pytest" in line) == TESTS
    script = (ROOT / ".ci" / "run").read_text()
    assert "grep -m 1 -F '.venv/bin/pytest' README.md" in script
    assert "bin/checkpoints demo" in script


def test_readme_and_changelog_say_the_version_of_the_package() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def run_script(file: Path) -> str:
    """Run a Python file to its end; what it says."""
    done = subprocess.run(
        [sys.executable, "-W", "error", file],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_every_script_is_tested_here() -> None:
    tested = {"ledger", "worker", "recorder", "consumer", "asyncio_consumer", "orm_projection"}
    assert {file.stem for file in EXAMPLES.glob("*.py")} == tested


def test_orm_projection(environment: URL) -> None:
    run_script(EXAMPLES / "ledger.py")
    said = run_script(EXAMPLES / "orm_projection.py")
    assert said.splitlines() == ["account-1: 70 in 2", "account-2: 5 in 1"]
    assert violations(environment) == []


@contextlib.contextmanager
def running(name: str, log: Path) -> Iterator[None]:
    """A script that runs until it is told to stop, and then ends well."""
    with (
        log.open("w") as output,
        subprocess.Popen(
            [sys.executable, "-W", "error", EXAMPLES / f"{name}.py"],
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            yield
            assert process.poll() is None, log.read_text()
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                code = process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
    assert code == 0, log.read_text()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Look every now and then, for half a minute."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.mark.parametrize(
    "programs",
    [
        ["worker", "worker"],
        ["recorder", "consumer", "consumer"],
        ["recorder", "asyncio_consumer", "asyncio_consumer"],
    ],
    ids="-".join,
)
def test_recorder_and_consumers(environment: URL, programs: list[str], tmp_path: Path) -> None:
    import ledger  # type: ignore[import-not-found,unused-ignore]

    run_script(EXAMPLES / "ledger.py")
    engine = create_engine(environment)
    accounts = [f"account-{number}" for number in range(20)]

    def append(amount: int) -> None:
        with engine.begin() as connection:
            for account in accounts:
                ledger.append(connection, account, *[amount] * 3)

    def balances_are(expected: int) -> bool:
        with engine.connect() as connection:
            counted = select(func.count()).where(ledger.balances.c.amount == expected)
            return connection.execute(counted).scalar_one() == len(accounts)

    with disposed(engine):
        append(1)
        with contextlib.ExitStack() as stack:
            for number, name in enumerate(programs):
                stack.enter_context(running(name, tmp_path / f"{number}.log"))
            wait_until(lambda: balances_are(3), "the messages that were there were not applied")
            append(10)
            wait_until(lambda: balances_are(33), "the messages appended since were not applied")
    assert violations(environment) == []
    for log in tmp_path.glob("*.log"):
        assert not re.search(r"Traceback|Error|lost", log.read_text()), log.read_text()
