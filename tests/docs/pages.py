"""The pages of the documentation, and the code blocks in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from sybil import Document, Example, Region, Sybil
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

ROOT = Path(__file__).parents[2]
PAGES = [
    page.relative_to(ROOT).as_posix()
    for page in (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md")))
]

# A fence without a language is a block too, of the language "".
_BLOCKS = RawFencedCodeBlockLexer(re.compile(r"(?P<language>[^\n]*)$\n", re.MULTILINE))


def examples(page: Path, evaluate: Callable[[Example], None]) -> Iterator[Example]:
    """The code blocks of a page; to evaluate one is to call `evaluate` with it."""

    def blocks(document: Document) -> Iterator[Region]:
        for region in _BLOCKS(document):
            region.parsed = region.lexemes["source"]
            region.evaluator = evaluate
            yield region

    yield from Sybil(parsers=[blocks]).parse(page).examples()


def language(example: Example) -> str:
    """The language that a block's fence names."""
    named: str = example.region.lexemes["language"].strip()
    return named


def without_blocks(text: str) -> str:
    """A page's text without its code blocks."""
    return re.sub(r"^(```+|~~~+).*?^\1[ \t]*$", "", text, flags=re.MULTILINE | re.DOTALL)
