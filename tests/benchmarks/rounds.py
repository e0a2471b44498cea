"""Rounds: contestants are measured in turns, so that what drifts hits all; and their statistics."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Measure", "Summary", "interleave", "order_of", "ratio", "summary"]

Measure = Callable[[], float]


def order_of(names: Sequence[str], number: int) -> list[str]:
    """The order of a round: each begins one further, so that nobody is always first."""
    turn = number % len(names) if names else 0
    return [*names[turn:], *names[:turn]]


def interleave(contestants: Mapping[str, Measure], rounds: int) -> dict[str, list[float]]:
    """Measure each contestant once in each round; its samples, by round."""
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, not {rounds!r}")
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name in order_of(list(contestants), number):
            samples[name].append(contestants[name]())
    return samples


@dataclass(frozen=True)
class Summary:
    """The middle of the samples and how far they spread."""

    median: float
    low: float
    high: float
    count: int


def summary(samples: Sequence[float]) -> Summary:
    """The median, the least and the greatest."""
    if not samples:
        raise ValueError("there are no samples")
    return Summary(statistics.median(samples), min(samples), max(samples), len(samples))


def ratio(samples: Sequence[float], base: Sequence[float]) -> Summary:
    """How many times the base, round by round: what was slow in one round was so for both."""
    if len(samples) != len(base):
        raise ValueError(f"{len(samples)} samples cannot be paired with {len(base)} of the base")
    if not all(base):
        raise ValueError("a sample of the base is 0")
    return summary([ours / theirs for ours, theirs in zip(samples, base, strict=True)])
