"""The reference says what the code says: a difference is written by `--update-rendered`."""

from __future__ import annotations

import pytest

import checkpoints
from checkpoints import runtime, statements
from tests.docs import reference
from tests.docs.pages import PAGES, ROOT


@pytest.mark.parametrize("page", reference.GENERATED)
def test_is_of_today(page: str, request: pytest.FixtureRequest) -> None:
    renewed = reference.renewed(page)
    if request.config.getoption("--update-rendered"):
        (ROOT / page).write_text(renewed)
    assert (ROOT / page).read_text() == renewed


def test_has_every_statement_once() -> None:
    named = [name for names in reference.BY_ACTOR.values() for name in names]
    assert sorted(named) == sorted(name for name in statements.__all__ if name.islower())


def test_has_every_name_of_the_runtime_once() -> None:
    named = [name for names in reference.RUNTIME.values() for name in names]
    named = [name for name in named if name not in reference._ELSEWHERE or name in runtime.__all__]
    assert sorted([*named, *reference.RUNTIME_BY_HAND]) == sorted(runtime.__all__)


def test_has_every_public_name() -> None:
    text = "".join((ROOT / page).read_text() for page in PAGES if "/reference/" in page)
    public = [*checkpoints.__all__, *runtime.__all__]
    assert [name for name in public if f"`{name}" not in text] == []
