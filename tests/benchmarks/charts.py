"""Charts of a run as SVG: the same bytes for the same samples, for light and dark pages."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from tests.benchmarks.report import number
from tests.benchmarks.results import Series
from tests.benchmarks.rounds import summary

__all__ = ["draw"]

# Of about the same contrast to white and to black.
_TEXT = "#7b828c"
_COLOURS = ("#3d8bd9", "#d9772b", "#3a9e5c", "#b05fc4", "#c4515f", "#8a8f2e", "#2b9aa3", "#8c6d5a")
_STYLE: dict[Any, Any] = {
    # Text stays text, in the reader's font.
    "svg.fonttype": "none",
    # Or else ids are random.
    "svg.hashsalt": "checkpoints",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _TEXT,
    "axes.titlesize": 9,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
}
_COLUMNS = 2
_TITLE = 48
_LABEL = 28


def draw(all_series: Sequence[Series], file: Path) -> None:
    """Draw a panel for each series into one picture."""
    rows = math.ceil(len(all_series) / _COLUMNS)
    names = list(dict.fromkeys(name for series in all_series for name in series.samples))
    colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(names)}
    heights = [
        max(_height(series) for series in all_series[row * _COLUMNS : (row + 1) * _COLUMNS])
        for row in range(rows)
    ]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(10, sum(heights)), layout="constrained")
        FigureCanvasSVG(figure)
        panels = figure.subplots(rows, _COLUMNS, squeeze=False, height_ratios=heights)
        for index, axes in enumerate(panels.flat):
            if index >= len(all_series):
                axes.set_axis_off()
            elif _grows(all_series[index]):
                _line(axes, all_series[index])
            else:
                _bars(axes, all_series[index], colours)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})


def _grows(series: Series) -> bool:
    return series.axis is not None and len(series.samples) > 1


def _height(series: Series) -> float:
    return 2.4 if _grows(series) else 0.8 + 0.24 * len(series.samples)


def _bars(axes: Axes, series: Series, colours: dict[str, str]) -> None:
    """A bar for each contestant, the first on top, with the least and the greatest."""
    found = {name: summary(samples) for name, samples in series.samples.items()}
    grows = series.part == "growth"
    places = list(range(len(found)))
    medians = [each.median for each in found.values()]
    axes.barh(
        places,
        medians,
        xerr=(
            [each.median - each.low for each in found.values()],
            [each.high - each.median for each in found.values()],
        ),
        color=[_COLOURS[0] if grows else colours[name] for name in found],
        ecolor=_TEXT,
        height=0.7,
    )
    for place, each in zip(places, found.values(), strict=True):
        axes.annotate(
            number(each.median), (each.high, place), (4, 0), textcoords="offset points", va="center"
        )
    axes.set_yticks(places, [textwrap.fill(name, _LABEL) for name in found])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.7g}"))
    axes.set_xlim(left=0)
    _finish(axes, f"{series.title}, {series.unit}")


def _line(axes: Axes, series: Series) -> None:
    """A line over the sizes, both in equal steps of a factor; zero stands at the left."""
    sizes = [int(name.replace(",", "")) for name in series.samples]
    found = [summary(samples) for samples in series.samples.values()]
    places = list(range(len(sizes)))
    medians = [each.median for each in found]
    axes.fill_between(
        places,
        [each.low for each in found],
        [each.high for each in found],
        color=_COLOURS[0],
        alpha=0.25,
        linewidth=0,
    )
    axes.plot(places, medians, marker="o", color=_COLOURS[0])
    axes.set_xticks(places, [f"{size:,}" for size in sizes])
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.7g}"))
    axes.set_ylim(bottom=0, top=1.15 * max(each.high for each in found))
    _finish(axes, f"{series.title}, {series.unit}")


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(textwrap.fill(title, _TITLE), loc="left")
    axes.patch.set_visible(False)
    axes.spines[["top", "right"]].set_visible(False)
