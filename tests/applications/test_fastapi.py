"""FastAPI: a session as a dependency, a consumer that lives as long as the application."""

# Annotations are evaluated: FastAPI reads them, and one of them is of a function's scope.
import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

import httpx
from fastapi import Depends, FastAPI, HTTPException
from sqlalchemy import URL, Engine
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from checkpoints import AsyncCheckpoints, Checkpoints, Reservation
from checkpoints.runtime import AsyncConsumer
from tests.applications import bank

Handler = Callable[[AsyncConnection, Reservation], Awaitable[None]]


def application(
    engine: AsyncEngine, subscription_id: int, handler: Handler, stopping: asyncio.Event
) -> FastAPI:
    """A bank; its consumer runs from start-up to shutdown."""
    sessions = async_sessionmaker(engine)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        consumer = AsyncConsumer(engine, bank.GROUP, handler)
        # The server has the signals, and ends the lifespan.
        running = asyncio.create_task(consumer.run(handle_signals=False))
        app.state.consumer = running
        try:
            yield
        finally:
            app.state.stopping.set()
            consumer.stop()
            await running

    # In the function's scope it commits before the answer is sent.
    async def session() -> AsyncIterator[AsyncSession]:
        async with sessions.begin() as made:
            yield made

    InTransaction = Annotated[AsyncSession, Depends(session, scope="function")]  # noqa: N806
    app = FastAPI(lifespan=lifespan)
    app.state.stopping = stopping

    @app.post("/accounts/{account}", status_code=201)
    async def book(account: str, amount: int, session: InTransaction) -> dict[str, int]:
        connection = await session.connection()
        version = await connection.run_sync(bank.append, subscription_id, account, amount)
        if amount == 0:
            raise HTTPException(422, "nothing was booked")
        return {"version": version}

    @app.get("/lagging")
    async def lagging(session: InTransaction) -> list[str]:
        return [one.stream_name for one in await AsyncCheckpoints(session).list_lagging()]

    return app


def serve(
    url: URL,
    engine: Engine,
    work: Callable[..., Awaitable[Any]],
    handler: Handler = bank.apply_async,
    stopping: asyncio.Event | None = None,
) -> Any:
    """Run requests against the application, between its start-up and its shutdown."""
    subscription_id = bank.found(engine)

    async def run() -> Any:
        async_engine = create_async_engine(url)
        app = application(async_engine, subscription_id, handler, stopping or asyncio.Event())
        transport = httpx.ASGITransport(app)
        async with (
            asyncio.timeout(bank.DEADLINE),
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://bank") as client,
        ):
            answer = await work(client)
        assert app.state.consumer.done()
        assert app.state.consumer.exception() is None
        await async_engine.dispose()
        return answer

    return asyncio.run(run())


def test_a_request_records_and_the_consumer_of_the_lifespan_applies(
    migrated_url: URL, engine: Engine
) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        for amount in (100, -30):
            answer = await client.post("/accounts/account-1", params={"amount": amount})
            assert answer.status_code == 201
        while bank.balance(engine, "account-1") != 70:
            await asyncio.sleep(0.01)

    serve(migrated_url, engine, work)
    bank.assert_sound(engine)


def test_a_request_that_raises_records_nothing(migrated_url: URL, engine: Engine) -> None:
    async def work(client: httpx.AsyncClient) -> Any:
        assert (await client.post("/accounts/a", params={"amount": 0})).status_code == 422
        return (await client.get("/lagging")).json()

    assert serve(migrated_url, engine, work) == []
    assert bank.balance(engine, "a") is None


def test_shutdown_awaits_the_handler_that_runs(migrated_url: URL, engine: Engine) -> None:
    begun, stopping = asyncio.Event(), asyncio.Event()

    async def slow(connection: AsyncConnection, reservation: Reservation) -> None:
        begun.set()
        # Until the consumer has been told to stop.
        await stopping.wait()
        await bank.apply_async(connection, reservation)

    async def work(client: httpx.AsyncClient) -> None:
        await client.post("/accounts/account-1", params={"amount": 5})
        await begun.wait()

    serve(migrated_url, engine, work, slow, stopping)
    assert bank.balance(engine, "account-1") == 5
    with engine.connect() as connection:
        assert Checkpoints(connection).list_reservations() == []
    bank.assert_sound(engine)
