"""The reference says what the code says: a difference is written by `--update-rendered`."""

from __future__ import annotations

import html
import re
from types import ModuleType

import pytest

import checkpoints
from checkpoints import embedded, migrations, runtime, statements, testing
from tests.docs import reference
from tests.docs.pages import PAGES, ROOT


@pytest.mark.parametrize("page", [*reference.GENERATED, *reference.FILES])
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


def on_the_site() -> list[str]:
    """The names that the site documents: by autodoc, or by hand where there is no docstring."""
    text = "".join((ROOT / page).read_text() for page in PAGES)
    return re.findall(r"<!-- site: (?:auto\w+|py:\w+) ([\w.]+)(?:\(\))? -->", text)


@pytest.mark.parametrize(
    "module",
    [checkpoints, runtime, embedded, migrations, testing],
    ids=lambda module: module.__name__,
)
def test_the_site_has_every_public_name_once(module: ModuleType) -> None:
    # `alembic_config` is a name of two modules, and described in one.
    elsewhere = set(migrations.__all__) if module is checkpoints else set()
    prefix = f"{module.__name__}."
    named = [name.removeprefix(prefix) for name in on_the_site() if name.startswith(prefix)]
    assert sorted(name for name in named if "." not in name) == sorted(
        set(module.__all__) - elsewhere
    )


def words(drawing: str) -> list[str]:
    """What can be read in an SVG."""
    return sorted(html.unescape(each) for each in re.findall(r"<text[^>]*>(.*?)</text>", drawing))


@pytest.mark.parametrize("drawing", ["states", "subscription-states"])
def test_a_drawing_says_what_its_source_says(drawing: str) -> None:
    folder = ROOT / "docs" / "explanation"
    source = (folder / f"{drawing}.dot").read_text()
    edges = re.findall(r"^  (\w+) -> (\w+)", source, re.M)
    labels = [line for label in re.findall(r'label="(.+?)"', source) for line in label.split(r"\n")]
    nodes = {node for edge in edges for node in edge}
    unlabelled = nodes - set(re.findall(r"^  (\w+) \[.*label=", source, re.M))
    svg = (folder / f"{drawing}.svg").read_text()
    assert words(svg) == sorted([*labels, *unlabelled]), "render it again, as the source says"
    titles = [html.unescape(title) for title in re.findall(r"<title>(.*?)</title>", svg)]
    assert sorted(title for title in titles if "->" in title) == sorted(map("->".join, edges))
