"""Fixtures of the runtime's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import URL, Engine

from tests.runtime.consumers import Bench


@pytest.fixture(params=["blocking", "asyncio"])
def bench(request: pytest.FixtureRequest, migrated_url: URL, engine: Engine) -> Iterator[Bench]:
    """Consumers of each kind on a database with the schema at head."""
    made = Bench(request.param, migrated_url, engine)
    yield made
    made.close()
