"""The command `checkpoints`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from sqlalchemy.exc import DBAPIError

from checkpoints.demo import DemoError
from checkpoints.embedded import ServerUnavailable

__all__ = ["main"]

_MOST_WORKERS = 32
_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all errors are here."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"checkpoints: {message}; see `{self.prog} --help`\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code: 0, 1 (the verdict is bad), 2 (it could not run) or 130."""
    given = _parser().parse_args(argv)
    try:
        return _demo(given)
    except KeyboardInterrupt:
        return _ended("interrupted", _INTERRUPTED)
    except BrokenPipeError:
        # Who read the output has gone; the interpreter must not find that out once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (DemoError, ServerUnavailable) as error:
        return _ended(str(error), 2)
    except DBAPIError as error:
        return _ended(f"the database failed: {error.orig}", 2)


def _demo(given: argparse.Namespace) -> int:
    missing = [name for name in ("rich", "psycopg") if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(f"{missing[0]} is missing: run `pip install 'checkpoints[demo]'`")
    # A path can hold what the terminal's encoding cannot.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        # Only here: it needs the extra.
        from checkpoints.demo.run import demonstrate  # noqa: PLC0415
    except ImportError as error:
        raise DemoError(f"{error}: run `pip install 'checkpoints[demo]'`") from error
    holds = demonstrate(given.repo, processes=given.workers, with_chaos=given.chaos, url=given.url)
    return 0 if holds else 1


def _ended(reason: str, code: int) -> int:
    sys.stderr.write(f"checkpoints: {' '.join(reason.split())}\n")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="checkpoints", description=__doc__)
    parser.add_argument(
        "--version", action="version", version=f"checkpoints {version('checkpoints')}"
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="process a git history with worker processes, exactly once, and verify it",
        description="Process a git history with worker processes, exactly once, and verify it: "
        "each path is a stream, each commit that touches it a message for two subscriptions. "
        "The exit code is 0 only if the result equals what git itself says.",
    )
    demo.add_argument(
        "--repo",
        type=Path,
        metavar="PATH",
        help="git repository (default: the clone that this package lies in, else the current "
        "directory)",
    )
    demo.add_argument(
        "--workers", type=_workers, default=4, metavar="N", help="worker processes (default: 4)"
    )
    demo.add_argument(
        "--chaos",
        action="store_true",
        help="kill and freeze workers at random, and have some messages fail at first",
    )
    demo.add_argument(
        "--url",
        help="PostgreSQL database to use instead of an embedded server; the schema "
        "'checkpoints_demo' is made in it and dropped at the end",
    )
    return parser


def _workers(given: str) -> int:
    if not (given.isascii() and given.isdigit() and 1 <= int(given) <= _MOST_WORKERS):
        raise argparse.ArgumentTypeError(f"expected 1 to {_MOST_WORKERS}, not {given!r}")
    return int(given)
