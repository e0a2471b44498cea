"""Links between the pages lead to a file that is there, and to a heading that is there."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, without_blocks

LINK = re.compile(r"(?<!!)\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(([^()\s]+)\)")
CODE = re.compile(r"`[^`\n]*`")


@cache
def anchors(page: Path) -> set[str]:
    """The anchors that a forge gives the headings of a page."""
    found: dict[str, int] = {}
    for heading in re.findall(
        r"^#{1,6}[ \t]+(.+?)[ \t]*#*$", without_blocks(page.read_text()), re.M
    ):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        number = found.get(slug, 0)
        found[slug] = number + 1
        if number:
            found[f"{slug}-{number}"] = 1
    return set(found)


def links(page: str) -> list[str]:
    """The targets of a page's links."""
    return LINK.findall(CODE.sub("``", without_blocks((ROOT / page).read_text())))


def broken(page: str, target: str) -> str | None:
    """What is wrong with a link."""
    if re.match(r"[a-z]+:", target):
        return None
    path, _, anchor = target.partition("#")
    file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
    if not file.is_relative_to(ROOT):
        return f"{target} leads out of the repository"
    if not file.exists():
        return f"{target} leads to nothing"
    if anchor and anchor not in anchors(file):
        return f"{target}: there is no such heading, but {sorted(anchors(file))}"
    return None


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    assert [wrong for target in links(page) if (wrong := broken(page, target))] == []


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached: set[str] = set()
    waiting = ["README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or not page.endswith(".md"):
            continue
        reached.add(page)
        for target in links(page):
            if not re.match(r"[a-z]+:|#", target):
                file = ((ROOT / page).parent / target.partition("#")[0]).resolve()
                waiting.append(file.relative_to(ROOT).as_posix())
    assert set(PAGES) <= reached


def test_every_page_says_where_to_go_next() -> None:
    ends = {"README.md", "CHANGELOG.md", "docs/index.md"}
    dead = [
        page
        for page in PAGES
        if page not in ends
        and not page.startswith("docs/decisions/0")
        and not re.search(r"^(## Next$|Next: \[)", (ROOT / page).read_text(), re.M)
    ]
    assert dead == []


@cache
def existing_names() -> frozenset[str]:
    """The names of all tests, and the paths of the files and folders they lie in."""
    found = set()
    for file in (ROOT / "tests").rglob("*.py"):
        path = file.relative_to(ROOT)
        found.add(path.as_posix())
        found |= {f"{folder.as_posix()}/" for folder in path.parents}
        found |= set(re.findall(r"^(?:async )?def (test_\w+)", file.read_text(), re.M))
    return frozenset(found)


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_are_named_exist(page: str) -> None:
    text = without_blocks((ROOT / page).read_text())
    named = re.findall(r"`(tests/[\w/]*(?:/|\.py)|test_\w+)`", text)
    assert [name for name in named if name not in existing_names() | {"tests/rendered/"}] == []
