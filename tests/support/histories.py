"""Git repositories for the tests of the demonstration."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

__all__ = [
    "AUTHOR",
    "ODD_NAMES",
    "build_odd_repository",
    "commit",
    "git",
    "import_commits",
    "write",
]

_IDENTITY = {
    "GIT_AUTHOR_NAME": 'Ann "Q" O\\Neil',
    "GIT_AUTHOR_EMAIL": "ann@example.org",
    "GIT_COMMITTER_NAME": "Committer",
    "GIT_COMMITTER_EMAIL": "committer@example.org",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
}
AUTHOR = 'Ann "Q" O\\\\Neil <ann@example.org>'

ODD_NAMES = [
    b" leading and trailing ",
    b"back\\slash",
    b"bell\a\x01\x1b[31m",
    b"carriage\rreturn",
    b'"quoted"',
    b"latin-1 \xe9",
    b"more\ttabs\t",
    b"-",
    b"1\t1\tlike numstat",
    b"new\nline",
    b"n" * 250,
    b"/".join([b"deep" * 50] * 14),
    "żółć 😀".encode(),
    b"\x02mark",
    b"\\x41",
]


def git(path: Path, *arguments: str | bytes, **environment: str) -> str:
    """What git says in a directory, undisturbed by the configuration of who runs the tests."""
    done = subprocess.run(
        ["git", *arguments],
        cwd=path,
        env={**os.environ, **_IDENTITY, **environment},
        check=True,
        stdout=subprocess.PIPE,
    )
    return done.stdout.decode("utf-8", "surrogateescape").strip()


def write(path: Path, name: bytes | str, content: bytes) -> None:
    """Write a file, in folders that may be missing, and tell git."""
    file = Path(path, os.fsdecode(name))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    git(path, "--literal-pathspecs", "add", "--", os.fsencode(name))


def commit(path: Path, message: str, *options: str) -> str:
    """Commit; the id."""
    git(path, "commit", "-q", "-m", message, *options)
    return git(path, "rev-parse", "HEAD")


def build_odd_repository(path: Path) -> Path:
    """A repository with everything that could be read wrongly."""
    git(path.parent, "init", "-q", "-b", "main", str(path))
    for name in ODD_NAMES:
        write(path, name, b"a\nb\n")
    write(path, "binary", b"\0\1\2")
    commit(path, "odd names")
    commit(path, "empty", "--allow-empty")
    git(path, "mv", "--", "back\\slash", "renamed")
    write(path, "renamed", b"a\nb\nc\n")
    commit(path, "rename")
    git(path, "checkout", "-q", "-b", "side")
    write(path, "side", b"1\n2\n3\n")
    commit(path, "side", "--author=Jos\xe9 <jose@example.org>")
    git(path, "checkout", "-q", "main")
    write(path, "binary", b"\0\1\3")
    write(path, b"latin-1 \xe9", b"b\n")
    commit(path, "main")
    git(path, "merge", "-q", "--no-ff", "-m", "merge", "side")
    git(path, "update-index", "--add", "--cacheinfo", f"160000,{'1' * 40},module")
    git(path, "rm", "-q", "--", "-")
    commit(path, "submodule and removal")
    return path


def import_commits(path: Path, commits: Iterable[dict[str, str]]) -> None:
    """Add commits of files with these contents to main, fast."""
    stream = []
    for number, files in enumerate(commits):
        stream.append(f"commit refs/heads/main\ncommitter a <a@b> {10**9 + number} +0000\ndata 0\n")
        stream += [
            f"M 644 inline {name}\ndata {len(content.encode())}\n{content}\n"
            for name, content in files.items()
        ]
    subprocess.run(
        ["git", "fast-import", "--quiet"], cwd=path, input="".join(stream).encode(), check=True
    )
