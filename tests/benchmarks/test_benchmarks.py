"""The benchmark counts, compares and reports rightly; at its smallest size all of it runs."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import URL, Engine, create_engine, func, select

from checkpoints.tables import checkpoints, checkpoints_ready, subscriptions
from tests.benchmarks import charts, pages, pgbench, report
from tests.benchmarks.__main__ import PARTS, keep_in, measure, publish
from tests.benchmarks.load import ClientFailed, Clients, add_checkpoints, add_subscription
from tests.benchmarks.plan import TINY
from tests.benchmarks.results import Results, Series, read, write
from tests.benchmarks.rounds import Summary, interleave, order_of, ratio, summary
from tests.benchmarks.server import NotDurable, Server, durable_server
from tests.benchmarks.texts import texts
from tests.benchmarks.work import Job, connect
from tests.support.databases import Databases, disposed
from tests.support.factories import violations

ROOT = Path(__file__).parents[2]

ENVIRONMENT = {
    "date": "2026-01-02",
    "plan": "tiny",
    "rounds": 3,
    "revision": None,
    "postgresql": "18.0",
    "settings": {"fsync": "on"},
    "python": "3.11.0",
    "packages": {"psycopg": "3.2"},
    "node": None,
    "pgbench": None,
    "system": "Linux",
    "cores": 2,
    "cpu": "a | b",
}


@pytest.fixture
def results() -> Results:
    """A run that was made up."""
    designs = Series(
        "designs",
        "4 clients",
        "cycles/s",
        "old",
        {"old": [100.0, 50.0, 80.0], "new": [250.0, 100.0, 240.0]},
        missing={"other": "it is not installed"},
    )
    growth = Series(
        "growth", "in all", "cycles/s", "10", {"10": [8.0], "1,000": [4.0]}, axis="in all"
    )
    return Results(dict(ENVIRONMENT), [designs, growth])


@pytest.fixture
def url(migrated_url: URL) -> str:
    return migrated_url.render_as_string(hide_password=False)


@pytest.fixture
def clients() -> Iterator[Clients]:
    with Clients() as made:
        yield made


def test_each_round_begins_with_another() -> None:
    order: list[str] = []

    def take_turn(name: str) -> float:
        order.append(name)
        return len(order)

    contestants = {name: partial(take_turn, name) for name in "abc"}
    samples = interleave(contestants, 4)
    assert "".join(order) == "abcbcacababc"
    assert samples == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}
    assert order_of([], 3) == []


def test_no_round_measures_nothing() -> None:
    with pytest.raises(ValueError, match="rounds must be at least 1, not 0"):
        interleave({"a": lambda: 1.0}, 0)


def test_a_summary_is_the_median_and_the_extremes() -> None:
    assert summary([5.0, 1.0, 9.0]) == Summary(5.0, 1.0, 9.0, 3)
    assert summary([1.0, 2.0]).median == 1.5
    with pytest.raises(ValueError, match="no samples"):
        summary([])


def test_a_ratio_is_taken_in_the_same_round() -> None:
    """The base of a slow round is slow too: medians of all rounds would say 3."""
    assert ratio([20.0, 30.0, 4.0], [10.0, 15.0, 2.0]) == Summary(2.0, 2.0, 2.0, 3)
    with pytest.raises(ValueError, match="cannot be paired"):
        ratio([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="base is 0"):
        ratio([1.0], [0.0])


def test_the_report_has_medians_spreads_ratios_and_what_is_missing(results: Results) -> None:
    page = report.page(results)
    assert "| 4 clients, cycles/s | **80.0**<br>50.0–100 | **240** ×2.50<br>100–250 |" in page  # noqa: RUF001
    assert "- Not measured: other: it is not installed." in page
    assert "| 1,000 | 4.00 | 4.00–4.00 | 0.50 |" in page  # noqa: RUF001
    assert "a \\| b" in page
    assert page.count("](designs.svg)") == page.count("](growth.svg)") == 1


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1234.5, "1,234"), (99.96, "100.0"), (12.34, "12.3"), (0.456, "0.46"), (0.0012, "0.0012")],
)
def test_a_figure_has_three_digits_or_so(value: float, shown: str) -> None:
    assert report.number(value) == shown


def test_what_is_written_can_be_read_and_published_again(results: Results, tmp_path: Path) -> None:
    write(results, tmp_path / "results.json")
    again = read(tmp_path / "results.json")
    assert again == results
    publish(results, tmp_path)
    first = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    publish(again, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == first
    assert set(first) == {"results.json", "results.md", "designs.svg", "growth.svg"}


def test_a_chart_is_svg_with_its_text_and_without_a_background(
    results: Results, tmp_path: Path
) -> None:
    file = tmp_path / "chart.svg"
    charts.draw(results.series, file)
    drawn = ET.fromstring(file.read_text())  # noqa: S314 - drawn here
    shown = [element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"old", "new", "4 clients, cycles/s", "in all, cycles/s"} <= set(shown)
    assert "ffffff" not in file.read_text()


def test_filled_as_was_said(engine: Engine, url: str) -> None:
    ids = add_subscription(url, "work", count=3)
    add_checkpoints(url, ids, 1_000, ready=30)
    with engine.connect() as connection:
        in_all = connection.scalar(select(func.count()).select_from(checkpoints))
        ready = connection.execute(
            select(checkpoints.c.subscription_id, func.count(), func.max(checkpoints.c.id))
            .join(checkpoints_ready, checkpoints_ready.c.id == checkpoints.c.id)
            .group_by(checkpoints.c.subscription_id)
        ).all()
        assert violations(connection) == []
    assert in_all == 1_000
    assert {(id, count) for id, count, _ in ready} == {(id, 10) for id in ids}
    # Spread over the table, not in one corner of it.
    assert max(last for _, _, last in ready) > 900


@pytest.mark.parametrize("work", ["psycopg", "toolkit", "transactions"])
@pytest.mark.parametrize("batch", [1, 7])
def test_what_clients_count_is_what_the_database_has(
    engine: Engine, url: str, clients: Clients, work: str, batch: int
) -> None:
    (subscription,) = add_subscription(url, "work")
    add_checkpoints(url, [subscription], 40, ready=40)
    job = Job(work=work, url=url, design="head", batch=batch)

    moved = sum(clients.calls(job, 5, warm_up=1)[-5:])

    with engine.connect() as connection:
        positions = connection.scalar(select(func.sum(checkpoints.c.stream_position)))
        ready = connection.scalar(select(func.count()).select_from(checkpoints_ready))
        assert violations(connection) == []
    assert moved == 5 * batch
    assert positions == moved + batch
    assert ready == 40


def test_with_due_since_nothing_is_forgotten(url: str, clients: Clients) -> None:
    """One client goes round: what it took since then is behind what becomes ready again."""
    (subscription,) = add_subscription(url, "work")
    add_checkpoints(url, [subscription], 20, ready=20)
    job = Job(work="psycopg", url=url, design="head", due_since=True)
    assert clients.calls(job, 100, warm_up=0) == [1] * 100


@pytest.mark.parametrize("work", ["transactions", "consumer"])
def test_a_drain_of_two_processes_does_each_once(
    engine: Engine, url: str, clients: Clients, work: str
) -> None:
    (subscription,) = add_subscription(url, "work")
    add_checkpoints(url, [subscription], 60, ready=60, version=1)

    drained = clients.drain(Job(work=work, url=url, batch=10, ending=True), 2)

    assert drained.done == 60
    assert drained.seconds > 0
    with engine.connect() as connection:
        assert connection.scalar(select(func.count()).select_from(checkpoints_ready)) == 0


@pytest.mark.parametrize("work", ["toolkit", "consumer"])
def test_a_drain_ends_when_its_time_is_up(url: str, clients: Clients, work: str) -> None:
    (subscription,) = add_subscription(url, "work")
    add_checkpoints(url, [subscription], 20_000, ready=20_000, version=1)

    drained = clients.drain(Job(work=work, url=url, batch=10, ending=True), 1, limit=0.3)

    assert 0 < drained.done < 20_000
    assert drained.seconds >= 0.25


def test_a_rate_of_nothing_is_an_error(url: str, clients: Clients) -> None:
    add_subscription(url, "work")
    job = Job(work="psycopg", url=url, design="head")
    with pytest.raises(ClientFailed, match="found nothing to do"):
        clients.rate(job, 2, seconds=0.05, warm_up=0.0)


def test_what_a_client_fails_with_is_said_and_the_next_job_runs(url: str, clients: Clients) -> None:
    (subscription,) = add_subscription(url, "work")
    add_checkpoints(url, [subscription], 5, ready=5)
    with pytest.raises(ClientFailed, match="KeyError: 'no such work'"):
        clients.rate(Job(work="no such work"), 1, seconds=0.05, warm_up=0.0)
    job = Job(work="psycopg", url=url, design="head")
    assert clients.rate(job, 1, seconds=0.05, warm_up=0.0) > 0


def test_a_script_of_pgbench_has_no_parameter_of_psycopg_left() -> None:
    for design, batch in (("head", 1), ("two tables", 1), ("two tables", 10)):
        script = pgbench.script(design, batch)
        assert script is not None
        assert "%(" not in script
        assert script.count("\\gset") == 2
    assert pgbench.script("head", 10) is None


@pytest.mark.parametrize("design", ["0.22.0", "0.23.0", "two tables", "head"])
def test_each_design_has_its_statements(design: str) -> None:
    made = texts(design)
    assert {"id", "token"} <= set(made.update.names)
    assert (made.record is None) == (design == "two tables")


def test_a_server_that_may_lose_commits_is_refused(database_url: URL) -> None:
    with connect(database_url.render_as_string(hide_password=False)) as connection:
        connection.execute(
            f'ALTER DATABASE "{database_url.database}" SET synchronous_commit = off'.encode()
        )
    given = database_url.render_as_string(hide_password=False)
    with (
        pytest.raises(NotDurable, match="synchronous_commit=off"),
        durable_server(given, None),
    ):
        pytest.fail("it was taken")


def test_at_its_smallest_all_of_it_runs(databases: Databases, tmp_path: Path) -> None:
    """Not the peers, which have tests of their own."""
    admin = databases.url("postgres")
    with connect(admin.render_as_string(hide_password=False)) as connection:
        before = connection.execute("SELECT datname FROM pg_database").fetchall()
    server = Server(admin, pgbench=None)
    try:
        parts = ["designs", "limits", "growth"]
        results = measure(server, TINY, parts, lambda _: None, lambda kept: keep_in(kept, tmp_path))
    finally:
        server.drop_all()

    assert len([series for series in results.series if series.part == "designs"]) == 6
    for series in results.series:
        assert series.base in series.samples
        for name, samples in series.samples.items():
            assert all(sample > 0 for sample in samples), (series.title, name)
    assert any("pgbench" in name for series in results.series for name in series.missing)
    assert read(tmp_path / "results.json") == results
    with connect(admin.render_as_string(hide_password=False)) as connection:
        after = connection.execute("SELECT datname FROM pg_database").fetchall()
    assert {row for row in after if str(row[0]).startswith("benchmark_")} <= set(before)


def test_the_contest_counts_ours(databases: Databases, clients: Clients) -> None:
    """Foreign and paused items are neither done nor in the way of the count."""
    from tests.benchmarks.contest import Ours

    for consumer, handlers in ((False, 1), (True, 1), (True, 3)):
        url = databases.create().render_as_string(hide_password=False)
        ours = Ours(clients, consumer, handlers)
        ours.prepare(url)
        ours.add(url, 20, "foreign")
        ours.add(url, 20, "paused")
        ours.add(url, 30, "work")
        assert ours.drain(url, 30, 1, 10) > 0
        with disposed(create_engine(url)) as engine, engine.connect() as connection:
            left = connection.execute(
                select(subscriptions.c.name, func.count())
                .join(checkpoints, checkpoints.c.subscription_id == subscriptions.c.id)
                .join(checkpoints_ready, checkpoints_ready.c.id == checkpoints.c.id)
                .group_by(subscriptions.c.name)
            ).all()
        assert {tuple(row) for row in left} == {("foreign-1", 20), ("paused-1", 20)}


def test_a_page_has_the_tables_that_it_asks_for(results: Results, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# Figures\n\n<!-- figures: designs 4 clients -->\nold\n<!-- figures: end -->\n\nmore\n"
        "<!-- figures: designs -->\n\n<!-- figures: end -->\n"
    )
    table = (
        "|  | old | new |\n| --- | --: | --: |\n"
        "| 4 clients, cycles/s | **80.0**<br>50.0–100 | **240** ×2.50<br>100–250 |"  # noqa: RUF001
    )
    assert pages.filled(page, results) == (
        f"# Figures\n\n<!-- figures: designs 4 clients -->\n{table}\n<!-- figures: end -->\n\n"
        f"more\n<!-- figures: designs -->\n{table}\n<!-- figures: end -->\n"
    )


def test_a_page_that_asks_for_what_was_not_measured_is_refused(
    results: Results, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- figures: designs 5 clients -->\n\n<!-- figures: end -->\n")
    with pytest.raises(ValueError, match="'designs' '5 clients'"):
        pages.filled(page, results)


@pytest.mark.parametrize("name", pages.PAGES)
def test_the_pages_have_the_figures_of_the_results_that_are_published(name: str) -> None:
    """`python -m tests.benchmarks --report-only` writes them again."""
    page = ROOT / name
    assert pages.filled(page, read(ROOT / "docs" / "benchmarks" / "results.json")) == (
        page.read_text()
    )


def test_what_is_published_is_one_whole_run() -> None:
    published = read(ROOT / "docs" / "benchmarks" / "results.json")
    assert [part for part, _ in report.parts_of(published)] == list(PARTS)
    assert published.environment["plan"] == "full"
