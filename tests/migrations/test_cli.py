"""`checkpoints migrate` and `checkpoints revision`."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import URL, Connection

from checkpoints import migrations
from checkpoints.migrations.revisions import known
from tests.migrations.projects import Project, start_project
from tests.migrations.support import engine_of, psql

HEAD = migrations.head()
FIRST = known()[1]


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    return subprocess.run(
        [sys.executable, "-m", "checkpoints", *arguments],
        cwd=cwd,
        env=inherited | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def connection(database_url: URL) -> Iterator[Connection]:
    with engine_of(database_url) as engine, engine.connect() as made:
        yield made


@pytest.mark.parametrize("schema", ["checkpoints", "my per%cent"])
def test_migrate_up_current_and_down(
    database_url: URL, connection: Connection, tmp_path: Path, schema: str
) -> None:
    url = database_url.render_as_string(hide_password=False)
    options = ("--url", url.replace("+psycopg", ""), "--schema", schema)

    def current() -> str:
        found = run("migrate", "current", *options, cwd=tmp_path)
        assert found.returncode == 0, found.stderr
        return found.stdout

    assert current() == f"base (head: {HEAD})\n"
    done = run("migrate", "upgrade", FIRST, *options, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    assert f"Running upgrade  -> {FIRST}" in done.stderr
    assert current() == f"{FIRST} (head: {HEAD})\n"
    # The newest, with the URL of the environment.
    done = run("migrate", "--schema", schema, cwd=tmp_path, DATABASE_URL=url)
    assert done.returncode == 0, done.stderr
    assert current() == f"{HEAD} (head)\n"
    migrations.verify(connection, schema=schema)
    connection.rollback()
    done = run("migrate", "downgrade", "base", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert migrations.installed_revision(connection, schema=schema) is None


def test_migrate_prints_sql_without_a_database(
    database_url: URL, connection: Connection, tmp_path: Path
) -> None:
    done = run("migrate", "--sql", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert psql(database_url, done.stdout).stderr == ""
    migrations.verify(connection)
    connection.rollback()
    done = run("migrate", "downgrade", f"{HEAD}:{FIRST}", "--sql", cwd=tmp_path)
    assert psql(database_url, done.stdout).stderr == ""
    assert migrations.installed_revision(connection) == FIRST


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["migrate"], "no database: set DATABASE_URL, or pass --url"),
        (["migrate", "current"], "no database: set DATABASE_URL, or pass --url"),
        (["migrate", "current", "--url", "nonsense"], "no database: "),
        (["migrate", "current", "--url", "postgresql://u@127.0.0.1:1/d"], "the database failed: "),
        (["migrate", "--url", "postgresql://u@127.0.0.1:1/d"], "cannot be reached"),
        (["migrate", "downgrade", "--sql"], "give the revision to downgrade to"),
        (["migrate", "upgrade", "0.1.0", "--sql"], "Can't locate revision"),
        (["migrate", "--sql", "--schema", ""], "schema must not be empty"),
        (["migrate", "sideways"], "invalid choice: 'sideways'"),
        (["revision"], "the following arguments are required: --from"),
        (["revision", "--from", "0.1.0"], "--from must be one of 'base', '0.22.0'"),
        (["revision", "--from", HEAD], f"to must be after --from, {HEAD!r}"),
        (["revision", "--from", "base"], "there is no 'alembic.ini': run this beside"),
        (["revision", "--from", "base", "--write"], "there is no 'alembic.ini'"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "Context impl" not in line]
    assert message in lines[-1]
    assert lines[-1].startswith("checkpoints: ")
    assert "Traceback" not in done.stderr


@pytest.fixture
def project(tmp_path: Path, database_url: URL) -> Project:
    return start_project(tmp_path, database_url)


def test_revision_prints_a_file_to_be_piped(project: Project, connection: Connection) -> None:
    printed = project.checkpoints("revision", "--from", "base", "--to", FIRST)
    (project.folder / "migrations" / "versions" / "tables.py").write_text(printed)
    # A file that the shell has made already, empty, is in the way of looking for the head.
    empty = project.folder / "migrations" / "versions" / "more.py"
    empty.touch()
    done = project.run("checkpoints", "revision", "--from", FIRST)
    assert done.returncode == 2
    assert "--write" in done.stderr
    revision = printed.partition("Revision ID: ")[2].partition("\n")[0]
    empty.write_text(project.checkpoints("revision", "--from", FIRST, "--revises", revision))
    project.alembic("upgrade", "head")
    migrations.verify(connection)
    connection.rollback()
    project.alembic("downgrade", "base")
    assert migrations.installed_revision(connection) is None


def test_revision_prints_what_the_house_would_write(project: Project) -> None:
    printed = project.checkpoints(
        *("revision", "--from", "base", "--revises", "base", "--schema", "it's"),
        *("-m", 'Tables of "checkpoints"'),
    )
    ast.parse(printed)
    assert "down_revision = None\n" in printed
    file = project.folder / "printed.py"
    file.write_text(printed)
    for check in (["format", "--check", "--line-length", "100"], ["check", "--select", "E,F,I"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *check, "--isolated", file],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_revision_writes_by_the_applications_template(
    project: Project, connection: Connection
) -> None:
    template = project.folder / "migrations" / "script.py.mako"
    template.write_text("# Ours.\n" + template.read_text())
    written = project.write("base", "--to", FIRST, "-m", "tables of checkpoints")
    assert written.name.endswith("_tables_of_checkpoints.py")
    text = written.read_text()
    assert text.startswith("# Ours.\n")
    assert f'    migrations.upgrade(op, from_="base", to="{FIRST}", schema="checkpoints")' in text
    # From another folder, too.
    other = project.folder / "other"
    other.mkdir()
    below = run("revision", "--from", FIRST, "--write", "-c", "../alembic.ini", cwd=other)
    assert below.returncode == 0, below.stderr
    project.alembic("upgrade", "head")
    migrations.verify(connection)


def test_revision_says_that_there_are_several_heads(project: Project) -> None:
    project.alembic("revision", "-m", "other", "--head", "base", "--splice")
    done = project.run("checkpoints", "revision", "--from", "base")
    assert done.returncode == 2
    assert "several heads" in done.stderr
    done = project.run("checkpoints", "revision", "--from", "base", "--write")
    assert done.returncode == 2
    assert "Multiple heads are present" in done.stderr
