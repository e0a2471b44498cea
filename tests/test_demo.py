"""`checkpoints demo` as a user runs it: the verdict, the exit code, and what is left behind."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import URL, Connection, Engine, create_engine, delete, inspect, text, update

from checkpoints import Checkpoints, Reservation
from checkpoints.demo import DemoError, projection
from checkpoints.demo.chaos import Misfortune, Unlucky
from checkpoints.demo.history import Repository
from checkpoints.demo.importer import Importer
from checkpoints.demo.projection import HANDLERS, read_messages
from checkpoints.demo.recorder import Recording
from checkpoints.demo.schema import database_url as parsed_url
from checkpoints.demo.schema import demo_schema
from checkpoints.demo.tables import GROUP, SCHEMA, authors, demo_engine, lines
from checkpoints.demo.verdict import Check, verdict
from checkpoints.demo.workers import LOST, RECOVERED, RETRIED
from checkpoints.runtime import Consumer, Handler, RetryPolicy
from tests.support.histories import build_odd_repository, commit, git, import_commits, write

COMMAND = [sys.executable, "-m", "checkpoints", "demo"]
# A run starts a server and processes.
SECONDS = 120
SOON = RetryPolicy(first_delay=timedelta(milliseconds=1))
UNREACHABLE = "postgresql://user:secret@127.0.0.1:1/nowhere"


@pytest.fixture(scope="module")
def odd_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_odd_repository(tmp_path_factory.mktemp("demo") / "odd")


@pytest.fixture(scope="module")
def long_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A history that takes some seconds to process."""
    path = tmp_path_factory.mktemp("demo")
    git(path, "init", "-q", "-b", "main", "long")
    import_commits(
        path / "long",
        ({f"{number % 500}/{file}": f"{number}" for file in range(5)} for number in range(3000)),
    )
    return path / "long"


def demo(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command off a terminal."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=SECONDS,
        check=False,
    )


def figure(output: str, name: str) -> int:
    """A number in the table at the end."""
    found = re.search(rf"{re.escape(name)}\W+([\d,]+)", output)
    assert found is not None, output
    return int(found[1].replace(",", ""))


def assert_one_line(done: subprocess.CompletedProcess[str], pattern: str) -> None:
    assert done.returncode == 2
    assert re.fullmatch(rf"checkpoints: [^\n]*{pattern}[^\n]*\n", done.stderr), done.stderr


def test_a_history_with_odd_names_passes(odd_repository: Path) -> None:
    done = demo("--repo", odd_repository, "--workers", "2", FORCE_COLOR="1")
    assert done.returncode == 0, done
    assert done.stderr == ""
    assert "PASSED" in done.stdout
    assert "ok projection lines: 19 rows equal" in done.stdout
    assert "ok audit_checkpoints(): 0 violations" in done.stdout
    assert figure(done.stdout, "commits") == 7
    assert figure(done.stdout, "merges, without changes of their own") == 1
    assert figure(done.stdout, "empty commits") == 1
    assert figure(done.stdout, "changes of binary files") == 2
    # Not a terminal: no control characters.
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", done.stdout)


def test_chaos_kills_and_fails_and_the_result_is_the_same(odd_repository: Path) -> None:
    done = demo("--repo", odd_repository, "--workers", "2", "--chaos")
    assert done.returncode == 0, done
    assert "PASSED" in done.stdout
    assert figure(done.stdout, "workers killed") >= 3
    assert figure(done.stdout, "recorders replaced") == 3
    assert figure(done.stdout, "reservations recovered") >= 1
    assert figure(done.stdout, "errors retried") >= 1


def test_a_history_of_one_commit_sees_a_kill_too(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "-b", "main", "one")
    write(tmp_path / "one", "file", b"a\n")
    commit(tmp_path / "one", "one")
    done = demo("--repo", tmp_path / "one", "--chaos")
    assert done.returncode == 0, done
    assert figure(done.stdout, "workers killed") >= 1
    assert figure(done.stdout, "errors retried") >= 1


def test_the_repository_is_the_clone_of_the_package_unless_named() -> None:
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        pytest.skip("not a clone")
    done = demo("--workers", "1")
    assert f"history: {root} at" in done.stdout
    assert done.returncode == 0


@contextmanager
def processed(
    url: URL, path: Path, handlers: Mapping[str, Handler] = HANDLERS
) -> Iterator[tuple[Engine, Repository]]:
    """A database in which all of a history is processed."""
    repository = Repository.at(path)
    with demo_schema(url):
        engine = demo_engine(url, pool_size=3)
        try:
            importer = Importer(engine, repository)
            importer.run()
            with recording(engine) as recorded:
                wait_until(lambda: recorded.has_all(importer))
            while left(engine):
                Consumer(engine, GROUP, handlers, concurrency=1, retry=SOON).drain()
            yield engine, repository
        finally:
            engine.dispose()


@contextmanager
def recording(engine: Engine) -> Iterator[Recording]:
    """What records in the background."""
    with ThreadPoolExecutor() as threads:
        recorded = Recording(engine)
        done = threads.submit(recorded.run)
        try:
            yield recorded
        finally:
            recorded.stop()
            done.result()


def left(engine: Engine) -> int:
    with engine.connect() as connection:
        metrics = Checkpoints(connection).get_metrics()
    return sum(each.ready + each.reserved for each in metrics)


def failing(checks: list[Check]) -> dict[str, list[str]]:
    return {check.name: list(check.differences) for check in checks if not check.holds}


def test_the_verdict_names_what_is_wrong_in_a_projection(
    database_url: URL, odd_repository: Path
) -> None:
    with processed(database_url, odd_repository) as (engine, repository):
        assert failing(verdict(engine, repository)) == {}
        with engine.begin() as connection:
            connection.execute(
                update(lines).where(lines.c.stream_name == "renamed").values(added=7)
            )
            connection.execute(delete(authors).where(authors.c.stream_name == "side"))
        assert failing(verdict(engine, repository)) == {
            "projection lines": ["'renamed': added 7, git says 3"],
            "projection authors": [
                "'José <jose@example.org>' in 'side': changes None, git says 1, added None, "
                "git says 3, deleted None, git says 0, binaries None, git says 0"
            ],
        }


def test_the_verdict_counts_what_it_does_not_name(database_url: URL, odd_repository: Path) -> None:
    with processed(database_url, odd_repository) as (engine, repository):
        with engine.begin() as connection:
            connection.execute(update(lines).values(last_commit="another"))
        (differences,) = failing(verdict(engine, repository)).values()
        assert len(differences) == 6
        assert differences[-1] == "and 14 more"


def test_the_verdict_sees_work_that_is_left(database_url: URL, odd_repository: Path) -> None:
    with processed(database_url, odd_repository) as (engine, repository):
        with engine.begin() as connection:
            connection.execute(
                text(
                    f"UPDATE {SCHEMA}.checkpoints SET stream_version = stream_version + 1"
                    " WHERE stream_name = 'renamed'"
                )
            )
        assert failing(verdict(engine, repository)) == {
            "work left": ["authors: 1 ready", "authors: 1 lag", "lines: 1 ready", "lines: 1 lag"]
        }


def test_the_verdict_sees_a_broken_rule(database_url: URL, odd_repository: Path) -> None:
    with processed(database_url, odd_repository) as (engine, repository):
        with engine.begin() as connection:
            connection.execute(
                text(
                    f"INSERT INTO {SCHEMA}.checkpoints_ready (id, process_at, subscription_id)"
                    f" SELECT id, 'infinity', subscription_id FROM {SCHEMA}.checkpoints"
                    " ORDER BY id LIMIT 1"
                )
            )
        assert "audit_checkpoints()" in failing(verdict(engine, repository))


def test_an_unlucky_message_fails_as_often_as_it_must_whatever_else_ends_an_attempt(
    database_url: URL, odd_repository: Path
) -> None:
    head = Repository.at(odd_repository).head
    unlucky = {name: Unlucky(handler, 1, head, 0) for name, handler in HANDLERS.items()}
    failed: Counter[str] = Counter()

    def counted(connection: Connection, reservation: Reservation) -> int | None:
        try:
            return unlucky[reservation.subscription_name](connection, reservation)
        except Misfortune as misfortune:
            failed[f"{reservation.subscription_name}: {misfortune}"] += 1
            raise

    with processed(database_url, odd_repository, dict.fromkeys(HANDLERS, counted)) as both:
        assert failing(verdict(*both)) == {}
    assert len(failed) > 20
    assert set(failed.values()) == {1, 2}


def test_consumers_log_what_chaos_counts(
    database_url: URL, odd_repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls = itertools.count()

    def interfere(connection: Connection, reservation: Reservation) -> int | None:
        match next(calls):
            case 0:
                raise RuntimeError("an error")
            case 1:
                with connection.engine.begin() as another:
                    Checkpoints(another).release_checkpoint_reservation(reservation.id)
            case 2:
                with connection.engine.begin() as another:
                    Checkpoints(another).reserve_next_available_checkpoint(
                        GROUP, timedelta(milliseconds=1)
                    )
        return HANDLERS[reservation.subscription_name](connection, reservation)

    with processed(database_url, odd_repository, dict.fromkeys(HANDLERS, interfere)) as both:
        assert failing(verdict(*both)) == {}
    logged = Counter(str(record.msg) for record in caplog.records if record.levelname == "WARNING")
    assert logged == {RETRIED: 1, LOST: 1, RECOVERED: 1}


def test_a_long_stream_is_processed_in_transactions_of_bounded_size(
    database_url: URL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "init", "-q", "-b", "main", "long")
    for number in range(7):
        write(tmp_path / "long", "file", b"%d\n" % number)
        commit(tmp_path / "long", "x")
    sizes = []

    def measure(connection: Connection, reservation: Reservation) -> int | None:
        sizes.append(len(read_messages(connection, reservation)))
        return HANDLERS[reservation.subscription_name](connection, reservation)

    monkeypatch.setattr(projection, "LIMIT", 3)
    with processed(database_url, tmp_path / "long", dict.fromkeys(HANDLERS, measure)) as both:
        assert sorted(sizes) == [1, 1, 3, 3, 3, 3]
        assert failing(verdict(*both)) == {}


def test_a_database_is_left_as_it_was(database_url: URL, odd_repository: Path) -> None:
    given = database_url.set(drivername="postgresql").render_as_string(hide_password=False)
    done = demo("--repo", odd_repository, "--url", given)
    assert done.returncode == 0, done
    assert schemas(database_url) == {"public", "information_schema"}


def test_a_schema_that_exists_is_refused_and_kept(database_url: URL, odd_repository: Path) -> None:
    engine = create_engine(database_url)
    with engine.begin() as connection:
        connection.execute(text(f"CREATE SCHEMA {SCHEMA}"))
    engine.dispose()
    given = database_url.render_as_string(hide_password=False)
    done = demo("--repo", odd_repository, "--url", given)
    assert_one_line(done, "DROP SCHEMA checkpoints_demo CASCADE")
    assert SCHEMA in schemas(database_url)


def test_a_run_that_fails_leaves_the_database_as_it_was(database_url: URL, tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "-b", "main", "broken")
    write(tmp_path / "broken", "file", b"a\n")
    commit(tmp_path / "broken", "first")
    blob = git(tmp_path / "broken", "rev-parse", "HEAD:file")
    (tmp_path / "broken" / ".git" / "objects" / blob[:2] / blob[2:]).unlink()
    given = database_url.render_as_string(hide_password=False)
    done = demo("--repo", tmp_path / "broken", "--url", given)
    assert_one_line(done, f"git: .*{blob}")
    assert SCHEMA not in schemas(database_url)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_cleans_up(
    database_url: URL, long_repository: Path, number: signal.Signals
) -> None:
    given = database_url.render_as_string(hide_password=False)
    with running("--repo", long_repository, "--chaos", "--url", given) as process:
        wait_until(lambda: sessions(database_url, "checkpoints demo worker%") >= 2)
        # As the terminal does it: to the workers too.
        os.killpg(process.pid, number)
        output, errors = process.communicate(timeout=30)
        assert process.returncode == 128 + number
        assert errors == ("checkpoints: interrupted\n" if number == signal.SIGINT else "")
        assert "PASSED" not in output
        wait_until(lambda: not group_exists(process.pid))
    assert SCHEMA not in schemas(database_url)
    assert sessions(database_url, "checkpoints%") == 0


def test_an_interrupted_run_leaves_no_server(long_repository: Path, tmp_path: Path) -> None:
    with running("--repo", long_repository, TMPDIR=str(tmp_path)) as process:
        wait_until(lambda: b"recorded" in os.read(process.stdout.fileno(), 4096))  # type: ignore[union-attr]
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        assert process.returncode == 130
        wait_until(lambda: not group_exists(process.pid))
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_no_worker(database_url: URL, long_repository: Path) -> None:
    given = database_url.render_as_string(hide_password=False)
    with running("--repo", long_repository, "--url", given) as process:
        wait_until(lambda: sessions(database_url, "checkpoints demo worker%") >= 2)
        process.kill()
        process.wait()
        wait_until(lambda: not group_exists(process.pid))
    # The schema stays: nobody is there to drop it.
    assert SCHEMA in schemas(database_url)


def test_what_cannot_be_run_is_said_in_one_line(odd_repository: Path, tmp_path: Path) -> None:
    assert_one_line(demo("--repo", tmp_path), "is not in a git repository; name a git repository")
    assert_one_line(demo("--repo", tmp_path / "missing"), "is not a directory")
    git(tmp_path, "init", "-q", "empty")
    assert_one_line(demo("--repo", tmp_path / "empty"), "has no commits at HEAD")
    unreachable = demo("--repo", odd_repository, "--url", UNREACHABLE)
    assert_one_line(unreachable, r"user:\*\*\*@127.0.0.1:1/nowhere cannot be used")
    assert_one_line(demo("--url", "mysql://host/x", "--repo", odd_repository), "must be PostgreSQL")
    assert_one_line(demo("--url", "nonsense", "--repo", odd_repository), "URL cannot be read")
    assert_one_line(demo("--workers", "0"), "expected 1 to 32, not '0'")
    assert_one_line(demo("--bogus"), "unrecognized arguments: --bogus")


def test_a_missing_extra_is_said_in_one_line(odd_repository: Path, tmp_path: Path) -> None:
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich" / "__init__.py").write_text("raise ImportError('no rich here')")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    done = demo("--repo", odd_repository, PYTHONPATH=path, PYTHONSAFEPATH="1")
    assert_one_line(done, r"no rich here: run `pip install 'checkpoints\[demo\]'`")


def test_a_reader_that_goes_away_is_no_error(odd_repository: Path) -> None:
    with running("--repo", odd_repository, PYTHONUNBUFFERED="1") as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(timeout=SECONDS) == 1
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_a_url_needs_no_driver_and_fails_in_time() -> None:
    assert parsed_url("postgres://h/d") == parsed_url("postgresql+psycopg2://h/d")
    assert parsed_url("postgresql://h/d").query["connect_timeout"] == "10"
    assert parsed_url("postgresql://h/d?connect_timeout=3").query["connect_timeout"] == "3"


def test_a_database_that_is_not_utf_8_is_refused(database_url: URL) -> None:
    admin = create_engine(database_url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(
            text("CREATE DATABASE demo_latin1 ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
        )
        try:
            with (
                pytest.raises(DemoError, match="must have the encoding UTF8"),
                demo_schema(database_url.set(database="demo_latin1")),
            ):
                pass
        finally:
            connection.execute(text("DROP DATABASE demo_latin1 WITH (FORCE)"))
    admin.dispose()


@contextmanager
def running(*arguments: str | Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The command in a process group of its own, as a shell starts it."""
    with subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def wait_until(condition: object) -> None:
    deadline = time.monotonic() + 30
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def schemas(url: URL) -> set[str]:
    engine = create_engine(url)
    try:
        return set(inspect(engine).get_schema_names())
    finally:
        engine.dispose()


def sessions(url: URL, name: str) -> int:
    engine = create_engine(url)
    counting = text(
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name LIKE :name"
    )
    try:
        with engine.connect() as connection:
            return int(connection.execute(counting, {"name": name}).scalar_one())
    finally:
        engine.dispose()
