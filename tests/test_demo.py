"""`checkpoints demo` as a user runs it: the verdict, the exit code, and what is left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import URL, Connection, Engine, create_engine, delete, inspect, text, update

from checkpoints import Checkpoints, CheckpointStatus, Reservation
from checkpoints.demo import DemoError
from checkpoints.demo.history import Repository
from checkpoints.demo.projection import HANDLERS, Handler, Message
from checkpoints.demo.recorder import Recorder
from checkpoints.demo.schema import database_url as parsed_url
from checkpoints.demo.schema import demo_schema
from checkpoints.demo.tables import SCHEMA, authors, demo_engine, incidents, lines, messages
from checkpoints.demo.verdict import Check, verdict
from checkpoints.demo.worker import Settings, work
from tests.test_history import build_odd_repository, commit, git, write

COMMAND = [sys.executable, "-m", "checkpoints", "demo"]
# A run starts a server and processes.
SECONDS = 120
UNREACHABLE = "postgresql://user:secret@127.0.0.1:1/nowhere"


@pytest.fixture(scope="module")
def odd_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_odd_repository(tmp_path_factory.mktemp("demo") / "odd")


@pytest.fixture(scope="module")
def long_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A history that takes some seconds to process."""
    path = tmp_path_factory.mktemp("demo")
    git(path, "init", "-q", "-b", "main", "long")
    history = []
    for number in range(3000):
        history.append(
            f"commit refs/heads/main\ncommitter a <a@b> {10**9 + number} +0000\ndata 0\n"
        )
        history += [
            f"M 644 inline {number % 500}/{file}\ndata {len(str(number))}\n{number}\n"
            for file in range(5)
        ]
    subprocess.run(
        ["git", "fast-import", "--quiet"],
        cwd=path / "long",
        input="".join(history).encode(),
        check=True,
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
def processed(url: URL, path: Path) -> Iterator[tuple[Engine, Repository]]:
    """A database in which one worker has processed all of a history."""
    repository = Repository.at(path)
    with demo_schema(url) as subscription_ids:
        engine = demo_engine(url, pool_size=2)
        try:
            recorder = Recorder(engine, repository, subscription_ids)
            recorder.run()
            assert recorder.error is None
            work_until_idle(engine)
            yield engine, repository
        finally:
            engine.dispose()


def work_until_idle(engine: Engine, handlers: dict[str, Handler] | None = None) -> None:
    settings = Settings(
        poll_every=timedelta(milliseconds=1), first_retry_after=timedelta(milliseconds=1)
    )

    def is_idle() -> bool:
        with engine.begin() as connection:
            metrics = Checkpoints(connection).get_metrics()
        return not any(each.ready or each.reserved for each in metrics)

    work(engine, handlers or dict(HANDLERS), is_idle, settings)


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
                    f"INSERT INTO {SCHEMA}.checkpoints_ready (id, process_at)"
                    f" SELECT min(id), 'infinity' FROM {SCHEMA}.checkpoints"
                )
            )
        assert "audit_checkpoints()" in failing(verdict(engine, repository))


def test_a_handler_that_always_fails_ends_as_failed_after_five_attempts(
    database_url: URL, odd_repository: Path
) -> None:
    def fail(connection: Connection, reservation: Reservation, received: list[Message]) -> None:
        HANDLERS["lines"](connection, reservation, received)
        raise RuntimeError("no")

    with processed(database_url, odd_repository) as (engine, repository):
        with engine.begin() as connection:
            connection.execute(
                text(
                    f"UPDATE {SCHEMA}.checkpoints SET stream_position = 0"
                    " WHERE stream_name = 'renamed' AND subscription_id ="
                    f" (SELECT id FROM {SCHEMA}.subscriptions WHERE name = 'lines')"
                )
            )
        work_until_idle(engine, {"lines": fail})  # type: ignore[dict-item]
        with engine.begin() as connection:
            (failed,) = Checkpoints(connection).list_failed()
            errors = connection.execute(text(f"SELECT count(*) FROM {SCHEMA}.incidents")).scalar()
        assert (failed.stream_position, failed.retry_attempts) == (0, 5)
        assert failed.status is CheckpointStatus.FAILED
        assert errors == 5
        # What it wrote before it raised is gone.
        assert failing(verdict(engine, repository)) == {"work left": ["lines: 1 failed"]}


def test_a_worker_whose_reservation_was_taken_applies_nothing(
    database_url: URL, odd_repository: Path
) -> None:
    with processed(database_url, odd_repository) as (engine, repository):
        with engine.begin() as connection:
            connection.execute(
                text(f"UPDATE {SCHEMA}.checkpoints SET stream_position = 0 WHERE id = 1")
            )
            connection.execute(delete(lines))
            connection.execute(delete(authors))
            connection.execute(text(f"UPDATE {SCHEMA}.checkpoints SET stream_position = 0"))

        def interfere(
            connection: Connection, reservation: Reservation, received: list[Message]
        ) -> None:
            HANDLERS[reservation.subscription_name](connection, reservation, received)
            if not taken:
                taken.append(reservation.id)
                with engine.begin() as another:
                    Checkpoints(another).release_checkpoint_reservation(reservation.id)

        taken: list[int] = []
        work_until_idle(engine, dict.fromkeys(HANDLERS, interfere))  # type: ignore[arg-type]
        assert len(taken) == 1
        assert failing(verdict(engine, repository)) == {}
        with engine.begin() as connection:
            lost = connection.execute(incidents.select().where(incidents.c.kind == "lost")).all()
        assert len(lost) == 1


def test_a_worker_that_stops_gives_back_what_it_had_not_started(
    database_url: URL, odd_repository: Path
) -> None:
    with processed(database_url, odd_repository) as (engine, _):
        with engine.begin() as connection:
            connection.execute(text(f"UPDATE {SCHEMA}.checkpoints SET stream_position = 0"))
            connection.execute(delete(messages))
            before = Checkpoints(connection).get_metrics()
        calls = iter([False, False])
        work(engine, HANDLERS, lambda: next(calls, True), replace(Settings(), reserve=5))
        with engine.begin() as connection:
            after = Checkpoints(connection).get_metrics()
        assert sum(each.reserved for each in after) == 0
        assert sum(each.ready for each in after) == sum(each.ready for each in before) - 1


def test_a_long_stream_is_processed_in_transactions_of_bounded_size(
    database_url: URL, tmp_path: Path
) -> None:
    git(tmp_path, "init", "-q", "-b", "main", "long")
    for number in range(7):
        write(tmp_path / "long", "file", b"%d\n" % number)
        commit(tmp_path / "long", "x")
    sizes = []

    def measure(connection: Connection, reservation: Reservation, received: list[Message]) -> None:
        sizes.append(len(received))
        HANDLERS[reservation.subscription_name](connection, reservation, received)

    with demo_schema(database_url) as subscription_ids:
        engine = demo_engine(database_url, pool_size=2)
        repository = Repository.at(tmp_path / "long")
        Recorder(engine, repository, subscription_ids).run()
        rounds = iter(range(8))
        work(
            engine,
            dict.fromkeys(HANDLERS, measure),  # type: ignore[arg-type]
            lambda: next(rounds, None) is None,
            Settings(reserve=1, messages=3),
        )
        assert sizes == [3, 3, 3, 3] or sorted(sizes) == [3, 3, 3, 3]
        work_until_idle(engine)
        assert failing(verdict(engine, repository)) == {}
        engine.dispose()


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
