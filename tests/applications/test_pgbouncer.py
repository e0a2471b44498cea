"""PgBouncer in transaction mode: the server's connection is another one in each transaction.

Its binary is named by CHECKPOINTS_PGBOUNCER; without it these tests do not
exist, and with one that does not work they fail loudly.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import URL, Engine, NullPool, create_engine
from sqlalchemy.ext.asyncio import create_async_engine

from checkpoints import Checkpoints, Reservation
from checkpoints.runtime import AsyncConsumer, Consumer
from tests.applications import bank
from tests.support.databases import disposed

BINARY = os.environ.get("CHECKPOINTS_PGBOUNCER")
# As the how-to says.
ARGUMENTS = {"prepare_threshold": None}
SETTINGS = {"listen": False, "poll_interval": timedelta(milliseconds=50)}


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


@pytest.fixture
def bouncer_url(migrated_url: URL, tmp_path: Path) -> Iterator[URL]:
    """The database behind a PgBouncer that has two connections for all."""
    assert BINARY is not None
    port = free_port()
    host = str(migrated_url.host or migrated_url.query["host"])
    users = tmp_path / "users"
    users.write_text(f'"{migrated_url.username}" "{migrated_url.password or ""}"\n')
    server_port = migrated_url.port or migrated_url.query.get("port", 5432)
    configuration = tmp_path / "pgbouncer.ini"
    configuration.write_text(
        f"[databases]\n"
        f"{migrated_url.database} = host={host} port={server_port} user={migrated_url.username}\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        f"auth_type = trust\nauth_file = {users}\npool_mode = transaction\n"
        f"default_pool_size = 2\nmax_client_conn = 100\n"
    )
    command = [BINARY, str(configuration)]
    if os.getuid() == 0:
        # It refuses to run as root.
        tmp_path.chmod(0o755)
        for parent in tmp_path.parents[:2]:
            parent.chmod(0o755)
        command = [BINARY, "--user=nobody", str(configuration)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:

        def answers() -> bool:
            assert process.poll() is None, (tmp_path / "log").read_text()
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        bank.until(answers, "PgBouncer answers")
        yield URL.create(
            "postgresql+psycopg",
            username=migrated_url.username,
            host="127.0.0.1",
            port=port,
            database=migrated_url.database,
        )
    finally:
        process.terminate()
        process.wait(bank.DEADLINE)


if BINARY is not None:

    def test_a_consumer_of_more_threads_than_server_connections(
        bouncer_url: URL, engine: Engine
    ) -> None:
        subscription_id = bank.found(engine)
        with disposed(
            create_engine(bouncer_url, connect_args=ARGUMENTS, poolclass=NullPool)
        ) as bounced:
            with bank.running(
                Consumer(bounced, bank.GROUP, bank.apply, concurrency=6, **SETTINGS)  # type: ignore[arg-type]
            ):
                for amount in (100, -30):
                    for number in range(12):
                        with bounced.begin() as connection:
                            bank.append(connection, subscription_id, f"account-{number}", amount)
                for number in range(12):
                    stream = f"account-{number}"
                    bank.until(lambda s=stream: bank.balance(engine, s) == 70, stream)  # type: ignore[misc]
            bank.assert_sound(bounced)

    def test_an_error_of_a_handler_is_recorded(bouncer_url: URL, engine: Engine) -> None:
        subscription_id = bank.found(engine)
        attempts: list[int] = []

        def handler(_connection: object, reservation: Reservation) -> None:
            attempts.append(reservation.retry_attempts)
            raise LookupError("no such account")

        with disposed(create_engine(bouncer_url, connect_args=ARGUMENTS)) as bounced:
            with bounced.begin() as connection:
                bank.append(connection, subscription_id, "account-1", 1)
            assert Consumer(bounced, bank.GROUP, handler, **SETTINGS).drain() == 0  # type: ignore[arg-type]
        assert attempts == [0]
        with engine.connect() as connection:
            (retry,) = Checkpoints(connection).list_retries()
        assert retry.stream_name == "account-1"
        bank.assert_sound(engine)

    def test_a_consumer_of_asyncio(bouncer_url: URL, engine: Engine) -> None:
        subscription_id = bank.found(engine)
        with engine.begin() as connection:
            for number in range(12):
                bank.append(connection, subscription_id, f"account-{number}", 7)

        async def work() -> int:
            bounced = create_async_engine(bouncer_url, connect_args=ARGUMENTS)
            consumer = AsyncConsumer(
                bounced,
                bank.GROUP,
                bank.apply_async,
                concurrency=4,
                **SETTINGS,  # type: ignore[arg-type]
            )
            done = await consumer.drain()
            await bounced.dispose()
            return done

        assert asyncio.run(work()) == 12
        bank.assert_sound(engine)
