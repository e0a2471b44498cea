"""The report of a run: a page of Markdown, and the tables in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from tests.benchmarks.results import Results, Series
from tests.benchmarks.rounds import Summary, ratio, summary

# ruff: noqa: RUF001 - a report is typeset

__all__ = ["HEADINGS", "number", "page", "parts_of", "table"]

HEADINGS = {
    "designs": (
        "Designs",
        "The same data and load on the schema of revision 0.22.0 (one table), of 0.23.0 (two hot "
        "tables) and of today (head), each by prepared SQL text through psycopg. A cycle is a "
        "reservation and an update of the position, in two commits; the checkpoint is ready again "
        "at once. × is to 0.22.0.",
    ),
    "limits": (
        "Limits",
        "The toolkit of today beside the very same SQL text without it, and beside the least there "
        "can be: a DELETE and an INSERT between two bare tables, twice. × is to psycopg with the "
        "toolkit's SQL.",
    ),
    "growth": (
        "Growth",
        "The toolkit of today while one thing grows and all else stays. × is to the first row.",
    ),
    "peers": (
        "Peers",
        "Other queues on PostgreSQL with items that do nothing, each with the settings that its "
        "own documentation recommends. An item of ours is a checkpoint with one message. Every "
        "item is done in a commit that waits for the disk; our reservations, which a crash may "
        "undo, do not wait. × is to the toolkit's statements.",
    ),
}


def parts_of(results: Results) -> list[tuple[str, list[Series]]]:
    """The series of each part."""
    by_part = groupby(results.series, lambda series: series.part)
    return [(part, list(series)) for part, series in by_part]


def page(results: Results) -> str:
    """The whole report."""
    lines = ["# Benchmark", "", *_environment(results.environment), ""]
    for part, all_series in parts_of(results):
        heading, words = HEADINGS[part]
        lines += [f"## {heading}", "", words, "", f"![{heading}]({part}.svg)", ""]
        for tabled, grouped in groupby(all_series, _is_table_of_its_own):
            for series in _grouped(list(grouped), tabled):
                lines += series
                lines.append("")
        lines += _missing(all_series)
    lines.append(
        "Next: [Run the benchmarks](../how-to/run-the-benchmarks.md) says how it is measured."
    )
    return "\n".join(lines).rstrip() + "\n"


def number(value: float) -> str:
    """A figure with its two or three first digits."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"


def table(all_series: Sequence[Series]) -> str:
    """A row for each case, a column for each contestant."""
    return "\n".join(_table(all_series))


def _is_table_of_its_own(series: Series) -> bool:
    return series.axis is not None or series.part == "growth"


def _grouped(all_series: Sequence[Series], tabled: bool) -> list[list[str]]:
    if tabled:
        return [_own_table(series) for series in all_series]
    return [_table(list(same)) for _, same in groupby(all_series, lambda each: each.part)]


def _table(all_series: Sequence[Series]) -> list[str]:
    names = list(dict.fromkeys(name for series in all_series for name in series.samples))
    lines = [_row(["", *names]), _row(["---", *("--:" for _ in names)])]
    for series in all_series:
        cells = [_cell(series, name) for name in names]
        lines.append(_row([f"{series.title}, {series.unit}", *cells]))
    return lines


def _own_table(series: Series) -> list[str]:
    """A row for each size."""
    title = series.title[0].upper() + series.title[1:]
    lines = [f"### {title}", "", _row([series.axis or "", series.unit, "least–greatest", "×"])]
    lines.append(_row(["--:" if series.axis else "---", "--:", "--:", "--:"]))
    for name, samples in series.samples.items():
        found = summary(samples)
        lines.append(_row([name, number(found.median), _spread(found), _times(series, name)]))
    return lines


def _cell(series: Series, name: str) -> str:
    if name not in series.samples:
        return "–"
    found = summary(series.samples[name])
    times = "" if name == series.base else f" ×{_times(series, name)}"
    return f"**{number(found.median)}**{times}<br>{_spread(found)}"


def _spread(found: Summary) -> str:
    return f"{number(found.low)}–{number(found.high)}"


def _times(series: Series, name: str) -> str:
    base = series.samples.get(series.base)
    return number(ratio(series.samples[name], base).median) if base else "?"


def _missing(all_series: Sequence[Series]) -> list[str]:
    said = dict.fromkeys(
        (name, why) for series in all_series for name, why in series.missing.items()
    )
    if not said:
        return []
    lines = [f"- Not measured: {name}: {why}." for name, why in said]
    return [*lines, ""]


def _environment(given: dict[str, Any]) -> list[str]:
    packages = ", ".join(f"{name} {version}" for name, version in given["packages"].items())
    settings = ", ".join(f"{name} {value}" for name, value in given["settings"].items())
    rows: Iterable[tuple[str, object]] = (
        ("Date", given["date"]),
        ("Commit", given["revision"] or "unknown"),
        ("Run", f"{given['plan']}, {given['rounds']} rounds"),
        ("Machine", f"{given['cores']} cores, {given['cpu']}, {given['system']}"),
        ("PostgreSQL", f"{given['postgresql']}: {settings}"),
        ("Python", f"{given['python']}: {packages}"),
        ("pgbench", given["pgbench"] or "none"),
        ("Node", given["node"] or "none"),
        *((name, version) for name, version in given.get("peers", {}).items()),
    )
    lines = [_row(["", ""]), _row(["---", "---"])]
    lines += [_row([name, str(value)]) for name, value in rows]
    return [
        *lines,
        "",
        "Medians of the rounds, with the least and the greatest. In each round all contestants of "
        "a row are measured, one after the other; a ratio is the median of the ratios in the same "
        "round. Server and clients share the machine.",
    ]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
