"""The packaged revisions, and Alembic's configuration of them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from alembic.config import Config
from alembic.script import Script, ScriptDirectory
from sqlalchemy import URL
from sqlalchemy.dialects import postgresql

from checkpoints import _arguments as arguments

__all__ = ["BASE", "alembic_config", "head", "script_location"]

# What Alembic calls the state before the first revision.
BASE = "base"


def script_location() -> Path:
    """The folder of the migrations: beside the code in a wheel, at the top level in a clone."""
    package = Path(__file__).parents[1]
    for folder in (package / "alembic", package.parent / "alembic"):
        if (folder / "versions").is_dir():
            return folder
    raise FileNotFoundError(f"the migrations of checkpoints are missing beside {package}")


def alembic_config(url: str | URL, *, schema: str = "checkpoints") -> Config:
    """A `Config` for `alembic.command`, such as `upgrade(alembic_config(url), "head")`.

    `schema` is where the tables and the version table lie; it is made if it is missing.
    """
    if not isinstance(url, str | URL):
        raise TypeError(f"url must be a string or a sqlalchemy.URL, not {url!r}")
    if not str(url):
        raise ValueError("url must not be empty: expected postgresql+psycopg://user@host/database")
    arguments.name("schema", schema)
    config = Config()
    config.set_main_option("script_location", str(script_location()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["url"] = url
    config.attributes["schema"] = schema
    return config


def head() -> str:
    """The newest revision that this installation has: the one that its code needs."""
    return scripts()[-1].revision


@cache
def scripts() -> tuple[Script, ...]:
    """The revisions, oldest first. They are a straight line."""
    directory = ScriptDirectory(str(script_location()))
    return tuple(reversed(list(directory.walk_revisions())))


def known() -> list[str]:
    """The names of the revisions, from `base` to the newest."""
    return [BASE, *(script.revision for script in scripts())]


def revision(name: str, value: str, *, least: str = BASE) -> str:
    """One of the revisions, spelt out: `head` would mean another one with the next release."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, not {value!r}")
    names = known()
    names = names[names.index(least) :]
    if value not in names:
        expected = ", ".join(repr(each) for each in names)
        raise ValueError(f"{name} must be one of {expected}, not {value!r}")
    return value


def schema_name(name: str, value: str) -> str:
    """The name of a schema: a text of 1 to 63 bytes."""
    arguments.name(name, value)
    if len(value.encode()) > 63:
        raise ValueError(f"{name} must have at most 63 bytes, unlike {value!r}")
    return value


def quoted(identifier: str) -> str:
    """An identifier as SQL. A driver's paramstyle would double each %, as DDL() does."""
    preparer = postgresql.dialect(paramstyle="named").identifier_preparer  # type: ignore[no-untyped-call]
    return str(preparer.quote(identifier))


def literal(value: str) -> str:
    """A text as SQL."""
    return "'" + value.replace("'", "''") + "'"
