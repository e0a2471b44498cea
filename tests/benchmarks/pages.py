"""The figures in the pages: what stands between two comments is made of the results.

`<!-- figures: designs -->` is the table of a part, `<!-- figures: designs 4 clients -->` that of
the rows whose titles end so; it goes on to `<!-- figures: end -->`.
"""

from __future__ import annotations

import re
from pathlib import Path

from tests.benchmarks import report
from tests.benchmarks.results import Results

__all__ = ["PAGES", "filled"]

PAGES = ("README.md", "docs/explanation/figures.md")

_FIGURES = re.compile(
    r"(?P<begin><!-- figures: (?!end)(?P<part>\w+) ?(?P<title>[^>]*?) -->\n).*?"
    r"(?P<end><!-- figures: end -->)",
    re.DOTALL,
)


def filled(page: Path, results: Results) -> str:
    """The text of a page with the tables that the results make.

    Raises:
        ValueError: The results have nothing of what a comment names.
    """

    def table(match: re.Match[str]) -> str:
        part, title = match["part"], match["title"]
        chosen = [
            series
            for name, all_series in report.parts_of(results)
            for series in all_series
            if name == part and series.title.endswith(title)
        ]
        if not chosen:
            raise ValueError(f"{page}: the results have no series of {part!r} {title!r}")
        return f"{match['begin']}{report.table(chosen)}\n{match['end']}"

    return _FIGURES.sub(table, page.read_text())
