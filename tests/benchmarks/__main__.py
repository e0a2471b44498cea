"""Measure this toolkit, and write results, tables and charts into a folder."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from checkpoints.embedded import ServerUnavailable, available_majors
from tests.benchmarks import charts, contest, designs, growth, limits, pages, report
from tests.benchmarks.load import ClientFailed, Clients
from tests.benchmarks.plan import FULL, QUICK, Plan
from tests.benchmarks.results import Results, Say, Series, environment, read, write
from tests.benchmarks.server import VARIABLE, NotDurable, Server, durable_server

__all__ = ["PARTS", "main", "measure", "publish"]

Part = Callable[[Server, Clients, Plan, Say], list[Series]]

PARTS: dict[str, Part] = {
    "designs": designs.run,
    "limits": limits.run,
    "growth": growth.run,
    "peers": contest.run,
}

_ROOT = Path(__file__).parents[2]
# What is there is published: other pages have figures of it.
_PUBLISHED = _ROOT / "docs" / "benchmarks"
_RESULTS = "results.json"


def measure(
    server: Server, plan: Plan, parts: list[str], say: Say, keep: Callable[[Results], None]
) -> Results:
    """Run parts of the benchmark on a server; what there is after each part is kept."""
    results = Results(environment(server, plan.name, plan.rounds), [])
    if contest.PART in parts:
        results.environment["peers"] = contest.versions()
    with Clients() as clients:
        for part in parts:
            results.series += PARTS[part](server, clients, plan, say)
            keep(results)
    return results


def keep_in(results: Results, folder: Path) -> None:
    """Write the samples, the page and the charts."""
    write(results, folder / _RESULTS)
    publish(results, folder)


def publish(results: Results, folder: Path) -> None:
    """Write the page and the charts."""
    (folder / "results.md").write_text(report.page(results))
    for part, series in report.parts_of(results):
        charts.draw(series, folder / f"{part}.svg")
    whole = {part for part, _ in report.parts_of(results)} == set(PARTS)
    if folder.resolve() == _PUBLISHED and whole:
        for page in (_ROOT / name for name in pages.PAGES):
            page.write_text(pages.filled(page, results))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; its exit status."""
    given = _parser().parse_args(arguments)
    folder: Path = given.output
    folder.mkdir(parents=True, exist_ok=True)
    if given.report_only:
        publish(read(folder / _RESULTS), folder)
        return 0
    plan = QUICK if given.quick else FULL
    if given.rounds is not None:
        plan = plan.with_rounds(given.rounds)
    if given.largest is not None:
        plan = plan.with_largest(given.largest)
    begun = time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - begun:7.1f} s  {what}", file=sys.stderr, flush=True)

    # In this order, whatever order they are named in, and each once.
    parts = [part for part in PARTS if part in (given.only or PARTS)]
    try:
        with durable_server(given.url, given.postgres_major) as server:
            measure(server, plan, parts, say, lambda results: keep_in(results, folder))
    except (ServerUnavailable, NotDurable, ClientFailed) as error:
        print(error, file=sys.stderr)
        return 1
    say(f"done: {folder / 'results.md'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, under three minutes")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--rounds", type=_positive, help="how often each contestant is measured")
    parser.add_argument(
        "--largest", type=_positive, metavar="N", help="also measure with N checkpoints in all"
    )
    parser.add_argument("--output", type=Path, default=_PUBLISHED, help="docs/benchmarks")
    parser.add_argument(
        "--report-only", action="store_true", help="write page and charts of results.json again"
    )
    parser.add_argument("--url", help=f"a running server, as a superuser (or {VARIABLE})")
    parser.add_argument(
        "--postgres-major",
        type=int,
        help=f"of a throw-away server: {', '.join(map(str, available_majors()))}",
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
