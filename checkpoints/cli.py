"""The command `checkpoints`."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError, rev_id
from sqlalchemy import create_engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.pool import NullPool

from alembic import command
from checkpoints import migrations
from checkpoints.demo import DemoError
from checkpoints.embedded import ServerUnavailable
from checkpoints.migrations.rendering import revision_calls
from checkpoints.migrations.revisions import schema_name
from checkpoints.tables import DEFAULT_SCHEMA

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
        run: Callable[[argparse.Namespace], int] = given.run
        return run(given)
    except KeyboardInterrupt:
        return _ended("interrupted", _INTERRUPTED)
    except BrokenPipeError:
        # Who read the output has gone; the interpreter must not find that out once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (CommandError, DemoError, ServerUnavailable) as error:
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


def _migrate(given: argparse.Namespace) -> int:
    if given.action == "downgrade" and given.revision is None:
        raise CommandError("give the revision to downgrade to, or `base` to drop the tables")
    if given.action == "current":
        return _current(given)
    url = given.url or os.environ.get("DATABASE_URL")
    if not url and not given.sql:
        raise CommandError(_NO_URL)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING if given.sql else logging.INFO)
    config = migrations.alembic_config(url or "postgresql+psycopg://", schema=given.schema)
    migrate = command.upgrade if given.action == "upgrade" else command.downgrade
    migrate(config, given.revision or "head", sql=given.sql)
    return 0


_NO_URL = (
    "no database: set DATABASE_URL, or pass --url: expected postgresql+psycopg://user@host/database"
)


def _current(given: argparse.Namespace) -> int:
    try:
        url = make_url(given.url or os.environ.get("DATABASE_URL") or "")
        if url.drivername in {"postgres", "postgresql"}:
            url = url.set(drivername="postgresql+psycopg")
        engine = create_engine(url, poolclass=NullPool)
    except (ArgumentError, NoSuchModuleError, ImportError):
        raise CommandError(_NO_URL) from None
    with engine.connect() as connection:
        found = migrations.installed_revision(connection, schema=given.schema)
    head = migrations.head()
    note = "head" if found == head else f"head: {head}"
    sys.stdout.write(f"{found or 'base'} ({note})\n")
    return 0


def _revision(given: argparse.Namespace) -> int:
    try:
        calls = revision_calls(from_=given.from_, to=given.to, schema=given.schema)
    except ValueError as error:
        # Who calls the command knows the options, not the arguments.
        raise CommandError(str(error).replace("from_", "--from")) from None
    message = given.message or f"checkpoints {given.to or migrations.head()}"
    if given.revises is not None and not given.write:
        sys.stdout.write(
            migrations.render_revision(
                from_=given.from_,
                to=given.to,
                schema=given.schema,
                revision=rev_id(),
                down_revision=None if given.revises == "base" else given.revises,
                message=message,
            )
        )
        return 0
    if not given.config.is_file():
        raise CommandError(
            f"there is no {str(given.config)!r}: run this beside the application's alembic.ini, "
            "name it by --config, or give the application's newest revision by --revises "
            "(`base`: it has none)"
        )
    directory = ScriptDirectory.from_config(Config(str(given.config)))
    if given.write:
        script = directory.generate_revision(
            rev_id(),
            message,
            head=given.revises,
            imports="from checkpoints import migrations",
            upgrades=calls[0],
            downgrades=calls[1],
        )
        sys.stdout.write(f"{script.path if script else ''}\n")
        return 0
    try:
        heads = directory.get_heads()
    except CommandError as error:
        raise CommandError(
            f"{error} (if that is the file that this is written to: have it written by --write, "
            "or give --revises)"
        ) from None
    if len(heads) > 1:
        raise CommandError(f"there are several heads, {', '.join(heads)}: give one by --revises")
    given.revises = heads[0] if heads else "base"
    return _revision(given)


def _ended(reason: str, code: int) -> int:
    sys.stderr.write(f"checkpoints: {' '.join(reason.split())}\n")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="checkpoints", description=__doc__)
    parser.add_argument(
        "--version", action="version", version=f"checkpoints {version('checkpoints')}"
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_migrate(commands)
    _add_revision(commands)
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
    demo.set_defaults(run=_demo)
    return parser


def _add_migrate(commands: argparse._SubParsersAction[_Parser]) -> None:
    migrate = commands.add_parser(
        "migrate",
        help="make, upgrade or drop the tables, apart from any application's migrations",
        description="Make, upgrade or drop the tables, apart from any application's migrations.",
    )
    migrate.add_argument(
        "action",
        nargs="?",
        choices=("upgrade", "downgrade", "current"),
        default="upgrade",
        help="what to do; current says which revision the database is at (default: upgrade)",
    )
    migrate.add_argument(
        "revision",
        nargs="?",
        help="revision to reach (default: the newest), or a range such as 0.22.0:0.23.0 with --sql",
    )
    migrate.add_argument("--url", help="PostgreSQL database (default: that in DATABASE_URL)")
    _add_schema(migrate)
    migrate.add_argument(
        "--sql", action="store_true", help="print the SQL, for psql or another migration tool"
    )
    migrate.set_defaults(run=_migrate)


def _add_revision(commands: argparse._SubParsersAction[_Parser]) -> None:
    revision = commands.add_parser(
        "revision",
        help="print or write a revision for an application's own Alembic migrations",
        description="Print a revision for an application's own Alembic migrations, which upgrades "
        "the tables when the application is upgraded.",
    )
    revision.add_argument(
        "--from",
        dest="from_",
        required=True,
        metavar="REVISION",
        help="revision the tables are at before: base for the first installation; `checkpoints "
        "migrate current` says which a database is at",
    )
    revision.add_argument(
        "--to", metavar="REVISION", help="revision to reach (default: the newest)"
    )
    _add_schema(revision)
    revision.add_argument(
        "--write",
        action="store_true",
        help="write the file into the application's migrations, and print its name",
    )
    revision.add_argument(
        "-c",
        "--config",
        type=Path,
        default=Path("alembic.ini"),
        metavar="PATH",
        help="the application's alembic.ini (default: that in the current directory)",
    )
    revision.add_argument(
        "--revises",
        metavar="REVISION",
        help="the application's revision before; base: none (default: its head)",
    )
    revision.add_argument("-m", "--message", help="what the revision is called")
    revision.set_defaults(run=_revision)


def _add_schema(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--schema",
        type=_schema,
        default=DEFAULT_SCHEMA,
        help=f"schema of the tables (default: {DEFAULT_SCHEMA})",
    )


def _workers(given: str) -> int:
    if not (given.isascii() and given.isdigit() and 1 <= int(given) <= _MOST_WORKERS):
        raise argparse.ArgumentTypeError(f"expected 1 to {_MOST_WORKERS}, not {given!r}")
    return int(given)


def _schema(given: str) -> str:
    try:
        return schema_name("schema", given)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
