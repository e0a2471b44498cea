"""A migration in a thread, and two connections of the application that goes on meanwhile.

Each module has its own `url`: the database that is migrated.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import URL, Connection

from tests.migrations.support import engine_of


@pytest.fixture
def in_a_thread() -> Iterator[ThreadPoolExecutor]:
    """A thread that ends after the connections, for whose locks it may wait."""
    with ThreadPoolExecutor(1) as executor:
        yield executor


@pytest.fixture
def connection(url: URL, in_a_thread: ThreadPoolExecutor) -> Iterator[Connection]:  # noqa: ARG001
    with engine_of(url) as engine, engine.connect() as made:
        yield made


@pytest.fixture
def other(url: URL, in_a_thread: ThreadPoolExecutor) -> Iterator[Connection]:  # noqa: ARG001
    with engine_of(url) as engine, engine.connect() as made:
        yield made
