"""The plugin of pytest, in the project of a user, in a process of its own."""

from __future__ import annotations

import secrets
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from sqlalchemy import URL, create_engine, text

from checkpoints.testing._databases import VARIABLE
from tests.docs.pages import ROOT
from tests.support.databases import Databases, disposed

CONFTEST = """
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from checkpoints.testing import process

pytest_plugins = ["checkpoints.testing"]


@pytest.fixture(scope="session")
def checkpoints_migrate(checkpoints_migrate):
    def migrate(url):
        checkpoints_migrate(url)
        with Path(__file__).with_name("templates").open("a") as file:
            print(url.database, file=file)
        # Its connections are left open.
        engine = create_engine(url)
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE done (stream text)"))
        engine.connect()
        pytest.engine_of_the_template = engine

    return migrate
"""

TESTS = """
import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from checkpoints import Checkpoints, migrations
from checkpoints.testing import process

DONE = text("SELECT stream FROM done")
INSERT = text("INSERT INTO done VALUES (:stream)")


def handler(connection, reservation):
    connection.execute(INSERT, {"stream": reservation.stream_name})


def processed(connection):
    id = Checkpoints(connection).add_or_update_subscription("group", "name").id
    process(connection, handler, id, "stream", 3)
    return connection.scalars(DONE).all()


@pytest.mark.parametrize("turn", range(3))
def test_a_transaction_is_rolled_back(checkpoints_connection, turn):
    migrations.verify(checkpoints_connection)
    assert processed(checkpoints_connection) == ["stream"]


@pytest.mark.parametrize("turn", range(3))
def test_commits_of_a_session_are_savepoints(checkpoints_connection, turn):
    with Session(checkpoints_connection) as session:
        session.execute(INSERT, {"stream": "committed"})
        session.commit()
        session.execute(INSERT, {"stream": "rolled back"})
        session.rollback()
    with Session(checkpoints_connection) as session, session.begin():
        session.execute(INSERT, {"stream": "committed, too"})
    assert checkpoints_connection.scalars(DONE).all() == ["committed", "committed, too"]


def test_a_commit_is_refused(checkpoints_connection):
    checkpoints_connection.execute(INSERT, {"stream": "stays out"})
    with pytest.raises(RuntimeError, match="must not be committed"):
        checkpoints_connection.commit()


@pytest.mark.parametrize("turn", range(2))
def test_an_error_does_not_reach_the_next_test(checkpoints_connection, turn):
    with pytest.raises(Exception, match="division"):
        checkpoints_connection.execute(text("SELECT 1 / 0"))


@pytest.mark.parametrize("turn", range(3))
def test_an_engine_has_a_database_of_its_own(checkpoints_engine, checkpoints_url, turn):
    assert checkpoints_engine.url == checkpoints_url
    with checkpoints_engine.begin() as connection:
        assert processed(connection) == ["stream"]


def test_all_are_on_one_database(checkpoints_connection, checkpoints_engine):
    with checkpoints_engine.begin() as connection:
        connection.execute(INSERT, {"stream": "committed"})
    assert checkpoints_connection.scalars(DONE).all() == ["committed"]


def test_the_shared_database_is_as_it_was_made(checkpoints_connection):
    assert checkpoints_connection.scalars(DONE).all() == []
    assert checkpoints_connection.scalar(text("SELECT count(*) FROM checkpoints.checkpoints")) == 0
"""
COUNT = 14


@pytest.fixture
def server(databases: Databases, monkeypatch: pytest.MonkeyPatch) -> URL:
    """The server of this run, named for the tests of the user."""
    url = databases.url("postgres")
    monkeypatch.setenv(VARIABLE, url.render_as_string(hide_password=False))
    return url


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    """The project of a user."""
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(TESTS)
    return pytester


def run(project: pytest.Pytester, *options: str) -> pytest.RunResult:
    """Run its tests; a warning is an error."""
    return project.runpytest_subprocess("-W", "error", "-p", "no:cacheprovider", *options)


def left_over(project: pytest.Pytester, server: URL, sessions: int) -> list[str]:
    """The databases of the user's tests that are still there; others may use the server."""
    templates = (project.path / "templates").read_text().split()
    assert len(set(templates)) == sessions
    prefixes = tuple(template.rpartition("_")[0] for template in templates)
    engine = create_engine(server)
    with disposed(engine), engine.connect() as connection:
        names = connection.scalars(text("SELECT datname FROM pg_database"))
        return [name for name in names if name.startswith(prefixes)]


@pytest.mark.parametrize("workers", [0, 2])
def test_on_a_named_server(project: pytest.Pytester, server: URL, workers: int) -> None:
    run(project, "-n", str(workers)).assert_outcomes(passed=COUNT)
    assert left_over(project, server, max(1, workers)) == []


def test_on_an_embedded_server(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    run(project).assert_outcomes(passed=COUNT)


def test_from_the_wheel(
    project: pytest.Pytester, server: URL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "checkpoints/py.typed" in archive.namelist()
        archive.extractall(tmp_path / "installed")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "installed"))
    project.makepyfile(
        test_where=f"""
        import checkpoints

        def test_it_is_the_wheel():
            assert checkpoints.__file__.startswith({str(tmp_path)!r})
        """
    )
    run(project).assert_outcomes(passed=COUNT + 1)
    assert server


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("postgresql", "CHECKPOINTS_TEST_URL must be a URL such as *"),
        ("mysql://secret:secret@host/", "*must begin with postgresql+psycopg://, not mysql://"),
        (
            "postgresql+psycopg://someone:secret@/postgres?host=/no/such/folder",
            "*the server of CHECKPOINTS_TEST_URL cannot be had, postgresql+psycopg://someone:[*]*",
        ),
    ],
)
def test_a_server_that_cannot_be_had_is_a_failure(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, named: str, expected: str
) -> None:
    monkeypatch.setenv(VARIABLE, named)
    result = run(project, "-k", "test_a_commit_is_refused or test_all_are_on_one")
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines([f"*no PostgreSQL server for the tests: {expected}"])
    assert "secret" not in result.stdout.str()


def test_a_role_without_rights_is_a_failure(
    project: pytest.Pytester, server: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    role = f"checkpoints_test_role_{secrets.token_hex(4)}"
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    with disposed(engine), engine.connect() as connection:
        connection.execute(text(f"CREATE ROLE {role} LOGIN PASSWORD 'secret'"))
        try:
            url = server.set(username=role, password="secret")  # noqa: S106 - of this test
            monkeypatch.setenv(VARIABLE, url.render_as_string(hide_password=False))
            result = run(project, "-k", "test_a_commit_is_refused")
        finally:
            connection.execute(text(f"DROP ROLE {role}"))
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*must be allowed to create databases*"])


def test_no_binaries_is_a_failure(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    project.makepyfile(
        sitecustomize="""
        from checkpoints.embedded import _binaries

        _binaries._search = lambda: ([], [])
        """
    )
    monkeypatch.setenv("PYTHONPATH", str(project.path))
    result = run(project, "-k", "test_a_commit_is_refused")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        [
            "*no PostgreSQL server for the tests: no PostgreSQL server was found*",
            "A running one is named in CHECKPOINTS_TEST_URL.",
        ]
    )


def test_nothing_is_loaded_for_those_who_do_not_ask(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import sys

        def test_it():
            assert not any(name.split(".")[0] == "checkpoints" for name in sys.modules)
        """
    )
    run(pytester).assert_outcomes(passed=1)


def test_a_handler_is_run_without_pytest() -> None:
    code = "import sys, checkpoints.testing; assert '_pytest' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
