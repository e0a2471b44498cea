"""Reads a git history: each path is a stream, each commit that touches it a message."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from checkpoints.demo import DemoError

__all__ = ["Change", "Commit", "Repository", "log_lines", "parse_log", "read_commits", "text_of"]

# A user's configuration must not change what `git log` says or how it says it. Settings that
# have no option of `git log` in every version are overridden with -c.
_CONFIGURATION = {
    "core.attributesFile": "/dev/null",
    "core.bigFileThreshold": "512m",
    "core.quotePath": "true",
    "diff.relative": "false",
    "log.mailmap": "false",
    "log.showRoot": "true",
    "log.showSignature": "false",
}
# A rename is a deletion and a creation, so that both streams get their message. A merge has no
# diff of its own, as `git log --numstat` has it.
_LOG = (
    "log",
    "--numstat",
    "--no-renames",
    "--no-ext-diff",
    "--no-textconv",
    "--no-notes",
    "--no-color",
    "--diff-algorithm=myers",
    "--ignore-submodules=none",
    "--submodule=short",
    "--encoding=UTF-8",
    "-O/dev/null",
)
# Of git's variables, a hook or a script may have left some that name another repository or change
# the diff. Kept are those that say where things are, and the user's configuration, which may
# declare the repository safe.
_KEPT = (
    "GIT_CONFIG",
    "GIT_EXEC_PATH",
    "GIT_CEILING_DIRECTORIES",
    "GIT_DISCOVERY_ACROSS_FILESYSTEM",
)
_MARK = b"\x02"
_CHUNK = 1 << 16
# A key of a B-tree index is at most 2,704 bytes long, one of these is an author and a path, and
# a path of git alone can have 4,096 bytes and more.
_NAME_BYTES = 1200


class _Truncated(DemoError):
    """The output ends where more must follow."""


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository at one commit: commits made during a run change nothing."""

    path: Path
    head: str
    commits: int
    shallow: bool

    @classmethod
    def at(cls, path: Path) -> Repository:
        """Find the repository of a directory: a clone, a directory inside one, or a bare one.

        Raises:
            DemoError: no directory, no repository, no commit, or git refuses.
        """
        advice = "name a git repository with --repo"
        if not os.path.isdir(path):
            raise DemoError(f"{str(path)!r} is not a directory; {advice}")
        try:
            shallow = _answer(path, "rev-parse", "--is-shallow-repository") == "true"
        except DemoError as error:
            if "not a git repository" not in str(error):
                raise
            raise DemoError(f"{str(path)!r} is not in a git repository; {advice}") from error
        try:
            head = _answer(path, "rev-parse", "--quiet", "--verify", "HEAD^{commit}")
        except DemoError as error:
            raise DemoError(f"{str(path)!r} has no commits at HEAD; {advice}") from error
        return cls(path, head, int(_answer(path, "rev-list", "--count", head)), shallow)


@dataclass(frozen=True, slots=True)
class Change:
    """What a commit did to one path; a binary file has no line counts."""

    path: str
    added: int | None
    deleted: int | None

    @property
    def binary(self) -> bool:
        """Whether git counts no lines here."""
        return self.added is None


@dataclass(frozen=True, slots=True)
class Commit:
    """One commit with its changes, in git's order."""

    id: str
    author: str
    parents: int
    changes: list[Change] = field(default_factory=list)


def text_of(name: bytes) -> str:
    r"""A name as text: UTF-8 is kept, any other byte becomes \xNN, a backslash is doubled.

    So two names never become one, and the bytes can be had back. A name too long for an index
    keeps its beginning, followed by \# and the SHA-256 of the whole.
    """
    text = name.replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")
    if len(text.encode()) <= _NAME_BYTES:
        return text
    return f"{text[: _NAME_BYTES // 4]}\\#{hashlib.sha256(name).hexdigest()}"


def read_commits(repository: Repository) -> Generator[Commit]:
    """The commits, the oldest first; one at a time is held in memory."""
    header = f"--format={_MARK.decode()}%H%x00%P%x00%an <%ae>"
    with _output(repository.path, *_LOG, "-z", "--reverse", header, repository.head, "--") as out:
        yield from parse_log(out)


def log_lines(repository: Repository, header: str) -> Generator[bytes]:
    """The same log in git's form for people: the newest first, by line, odd names quoted."""
    with _output(repository.path, *_LOG, f"--format={header}", repository.head, "--") as out:
        yield from out


def parse_log(stream: IO[bytes]) -> Iterator[Commit]:
    """The commits in the output of `git log -z --numstat` with the header of `read_commits`."""
    tokens = _tokens(stream)
    commit: Commit | None = None
    for token in tokens:
        if token.startswith(_MARK):
            if commit is not None:
                yield commit
            parents, author = next(tokens, b""), next(tokens, b"")
            commit = Commit(token[1:].decode("ascii"), text_of(author), len(parents.split()))
        elif commit is not None:
            # The line break between a header and the first change of its commit stays with -z.
            commit.changes.append(_change(token.removeprefix(b"\n")))
        else:
            raise DemoError(f"git log began with {token[:80]!r}, not with a commit")
    if commit is not None:
        yield commit


def _change(token: bytes) -> Change:
    # Only the first two tabs separate; others, and line breaks, belong to the name.
    match token.split(b"\t", 2):
        case [b"-", b"-", path] if path:
            return Change(text_of(path), None, None)
        case [added, deleted, path] if path and added.isdigit() and deleted.isdigit():
            return Change(text_of(path), int(added), int(deleted))
    raise DemoError(f"git log said {token[:80]!r} where a change of a file was expected")


def _tokens(stream: IO[bytes]) -> Iterator[bytes]:
    pending = b""
    while chunk := stream.read(_CHUNK):
        *whole, pending = (pending + chunk).split(b"\0")
        yield from whole
    if pending:
        raise _Truncated(f"git log ended in the middle: {pending[:80]!r}")


def _command(path: Path, *arguments: str) -> list[str]:
    settings = [word for pair in _CONFIGURATION.items() for word in ("-c", "=".join(pair))]
    return ["git", "--no-pager", "-C", str(path), *settings, *arguments]


def _environment() -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("GIT_") or name.startswith(_KEPT)
    }
    return kept | {
        "LC_ALL": "C",
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_OPTIONAL_LOCKS": "0",
        "GIT_TERMINAL_PROMPT": "0",
    }


def _answer(path: Path, *arguments: str) -> str:
    with _output(path, *arguments) as out:
        return os.fsdecode(out.read()).strip()


@contextlib.contextmanager
def _output(path: Path, *arguments: str) -> Iterator[IO[bytes]]:
    """What git writes; believed only when git ends well, and ended when the reader stops early."""
    # A file, for nobody reads git's complaints while it works, and a full pipe would stop it.
    with tempfile.TemporaryFile() as complaints:
        try:
            process = subprocess.Popen(  # noqa: S603  # the arguments are ours, no shell
                _command(path, *arguments),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=complaints,
                env=_environment(),
                start_new_session=True,  # Ctrl-C is for the parent, which ends git itself
            )
        except OSError as error:
            raise DemoError(
                f"git, which the history is read with, cannot be run: {error}"
            ) from error
        with process:
            assert process.stdout is not None  # noqa: S101  # for the type checker
            try:
                yield process.stdout
            except _Truncated:
                # Why git ended says more, if it says anything.
                if process.wait() == 0:
                    raise
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            complaints.seek(0)
            said = " ".join(os.fsdecode(complaints.read(2000)).split())
            raise DemoError(f"git: {said or f'ended with code {process.returncode}'}")
