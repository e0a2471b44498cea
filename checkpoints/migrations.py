"""Alembic's configuration of this package's migrations, for those who run them from Python."""

from __future__ import annotations

from pathlib import Path

from alembic.config import Config
from sqlalchemy import URL

from checkpoints import _arguments as arguments

__all__ = ["alembic_config", "script_location"]


def script_location() -> Path:
    """The folder of the migrations: beside the code in a wheel, at the top level in a clone."""
    package = Path(__file__).parent
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
