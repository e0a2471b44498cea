"""The driver that the loops need."""

from __future__ import annotations

from sqlalchemy import Engine

__all__ = ["check_driver"]


def check_driver(engine: Engine) -> None:
    """Refuse an engine of another driver than psycopg.

    Listening, interrupting and breaking a connection, and telling an outage from an error, go
    beyond what SQLAlchemy has in common for drivers.
    """
    dialect = engine.dialect
    if (dialect.name, dialect.driver) != ("postgresql", "psycopg"):
        raise ValueError(
            f"engine must use psycopg, not {dialect.driver}: give the runtime an engine of its own,"
            " with a URL that begins with postgresql+psycopg://; Checkpoints and AsyncCheckpoints"
            " run on the application's"
        )
