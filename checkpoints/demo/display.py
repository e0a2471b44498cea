"""What the user sees: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from checkpoints.demo.verdict import Check

__all__ = ["Display", "Progress"]

_PLAIN_SECONDS = 2.0
_RATE_SECONDS = 3.0


@dataclass(frozen=True)
class Progress:
    """How far it is. Messages count once for each subscription."""

    commits: int
    all_commits: int
    messages: int
    done: int
    ready: int
    reserved: int
    retrying: int
    failed: int
    killed: int


class Display:
    """Writes to the standard output; without a terminal there, no control characters."""

    def __init__(self) -> None:
        terminal = sys.stdout.isatty()
        self._console = Console(force_terminal=terminal, highlight=False, markup=False)
        self._live: Live | None = None
        self._is_live = terminal and not self._console.is_dumb_terminal
        self._done: deque[tuple[float, int]] = deque()
        self._next_line = 0.0

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(line, soft_wrap=True)

    @contextmanager
    def progressing(self) -> Iterator[None]:
        """While this lasts, `show` has a place."""
        if not self._is_live:
            yield
            return
        with Live(console=self._console, auto_refresh=False, transient=True) as self._live:
            yield

    def show(self, progress: Progress) -> None:
        """Show how far it is; off a terminal only now and then."""
        now = time.monotonic()
        self._done.append((now, progress.done))
        while now - self._done[0][0] > _RATE_SECONDS:
            self._done.popleft()
        (then, before), passed = self._done[0], now - self._done[0][0]
        rate = (progress.done - before) / passed if then < now else 0.0
        if self._live is not None:
            self._live.update(_panel(progress, rate), refresh=True)
        elif now >= self._next_line:
            self._next_line = now + _PLAIN_SECONDS
            self.say(
                f"recorded {progress.commits:,} of {progress.all_commits:,} commits; "
                f"ready {progress.ready:,}, reserved {progress.reserved:,}, "
                f"retrying {progress.retrying:,}, failed {progress.failed:,}; "
                f"done {progress.done:,} of {progress.messages:,} messages, {rate:,.0f}/s"
            )

    def conclude(self, figures: dict[str, str], checks: Sequence[Check]) -> None:
        """The table at the end, and the verdict."""
        table = Table(box=box.ROUNDED, show_header=False, border_style="dim")
        table.add_column(style="bold")
        table.add_column(justify="right")
        for name, figure in figures.items():
            table.add_row(name, Text(figure))
        self._console.print(table)
        for check in checks:
            self._print(
                "ok" if check.holds else "WRONG", check.holds, f"{check.name}: {check.found}"
            )
            for difference in check.differences:
                self._console.print(Text(f"      {difference}"), soft_wrap=True)
        holds = all(check.holds for check in checks)
        self._print(
            "PASSED" if holds else "FAILED",
            holds,
            "every message was applied exactly once"
            if holds
            else "the result is not what it must be",
        )

    def _print(self, word: str, good: bool, line: str) -> None:
        marked = Text(f"{word:>6} ", style="bold green" if good else "bold red")
        self._console.print(marked.append(line, style="default not bold"), soft_wrap=True)


def _panel(progress: Progress, rate: float) -> Panel:
    bars = Table.grid(padding=(0, 1), expand=True)
    bars.add_column(style="bold")
    bars.add_column(ratio=1)
    bars.add_column(justify="right")
    for name, done, total in (
        ("commits recorded", progress.commits, progress.all_commits),
        ("messages done", progress.done, progress.messages),
    ):
        bars.add_row(
            name,
            ProgressBar(max(total, 1), done, complete_style="cyan", finished_style="green"),
            f"{done:,} / {total:,}",
        )
    counted = (
        ("ready", progress.ready, "cyan"),
        ("reserved", progress.reserved, "blue"),
        ("retrying", progress.retrying, "yellow"),
        ("failed", progress.failed, "red"),
        ("killed", progress.killed, "magenta"),
    )
    counts = Text()
    for name, count, color in counted:
        counts.append(f"{name} ").append(f"{count:<6,}", f"bold {color}" if count else "dim")
        counts.append("  ")
    counts.append("rate ").append(f"{rate:,.0f}/s", "bold green")
    return Panel(Group(bars, Text(), counts), title="checkpoints demo", border_style="dim")
