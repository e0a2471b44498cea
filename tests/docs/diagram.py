"""A diagram of tables as SVG: the largest on the right, the others on the left, and references."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

from sqlalchemy import Column, ForeignKey, MetaData, Table

_FONT = 13
_CHARACTER = 7.9  # the width of one, in this size of a monospaced font
_LINE = 22
_PADDING = 12
_SPACE = 28  # between boxes
_LANE = 14  # between lines that run side by side

_STYLE = (
    f"text{{font:{_FONT}px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;fill:#24292f}}"
    "text.name{font-weight:bold;fill:#fff}text.type{fill:#6b7480}"
    "path,circle{fill:none;stroke:#55606e;stroke-width:1.4}"
)


class _Box:
    """A table, and where it is drawn."""

    def __init__(self, table: Table, type_of: Callable[[Column[Any]], str]) -> None:
        self.name = table.name
        self.rows = [
            (
                column.name,
                type_of(column),
                " ".join(["PK"] * column.primary_key + ["FK"] * bool(column.foreign_keys)),
            )
            for column in table.columns
        ]
        widths = [max(map(len, cells)) * _CHARACTER for cells in zip(*self.rows, strict=True)]
        self.type_at = round(widths[0] + 2 * _PADDING)
        self.width = round(sum(widths) + 4 * _PADDING)
        self.height = _LINE * (len(self.rows) + 1) + 6
        self.left = self.top = 0

    @property
    def right(self) -> int:
        return self.left + self.width

    def row(self, column: str) -> int:
        """The height at which a column's row is."""
        place = [name for name, _, _ in self.rows].index(column)
        return self.top + _LINE * (place + 1) + _LINE // 2 + 3

    def drawn(self) -> list[str]:
        """The frame, the name, the columns."""
        x, y, width = self.left, self.top, self.width
        lines = [
            f'<rect x="{x}" y="{y}" width="{width}" height="{self.height}" rx="6" fill="#fff" '
            'stroke="#3b5b8c"/>',
            f'<path style="fill:#3b5b8c;stroke:#3b5b8c" d="M{x} {y + _LINE}v-{_LINE - 6}q0 -6 6 -6'
            f'h{width - 12}q6 0 6 6v{_LINE - 6}z"/>',
            f'<text class="name" x="{x + _PADDING}" y="{y + 16}">{escape(self.name)}</text>',
        ]
        for name, type_, mark in self.rows:
            base = self.row(name) + 4
            lines += [
                f'<text x="{x + _PADDING}" y="{base}">{escape(name)}</text>',
                f'<text class="type" x="{x + self.type_at}" y="{base}">{escape(type_)}</text>',
                f'<text class="type" x="{self.right - _PADDING}" y="{base}" text-anchor="end">'
                f"{mark}</text>",
            ]
        return lines


def _end(x: int, y: int, way: int, kind: str) -> str:
    """An end of a reference, at the box from which it leads that way (1: to the right)."""
    bar = f'<path d="M{x + 9 * way} {y - 6}v12"/>'
    ring = f'<circle cx="{x + 15 * way}" cy="{y}" r="4"/>'
    foot = f'<path d="M{x} {y - 6}L{x + 11 * way} {y}L{x} {y + 6}"/>'
    return {"one": bar, "one at most": bar + ring, "many": foot + ring}[kind]


def _references(keys: list[ForeignKey], boxes: dict[str, _Box], margin: int, gap: int) -> list[str]:
    """The lines: those within a column in the margin, the others in the gap."""
    lines = []
    lanes = {margin: 0, gap: 0}
    for key in keys:
        one, many = boxes[key.column.table.name], boxes[key.parent.table.name]
        first, last = one.row(key.column.name), many.row(key.parent.name)
        if one.left == many.left:
            at, lane = margin, -1
            start, end, ways = one.left, many.left, (-1, -1)
        else:
            at, lane = gap, 1
            ways = (1, -1) if one.left < many.left else (-1, 1)
            start = one.right if ways[0] == 1 else one.left
            end = many.right if ways[1] == 1 else many.left
        turn = at + lane * lanes[at] * _LANE
        lanes[at] += 1
        lines += [
            f'<path d="M{start} {first}H{turn}V{last}H{end}"/>',
            _end(start, first, ways[0], "one"),
            _end(end, last, ways[1], "one at most" if key.parent.primary_key else "many"),
        ]
    return lines


def drawn(metadata: MetaData, type_of: Callable[[Column[Any]], str]) -> str:
    """The tables of `metadata`."""
    tables = metadata.sorted_tables
    largest = max(tables, key=lambda table: len(table.columns))
    boxes = {table.name: _Box(table, type_of) for table in tables}
    keys = sorted(
        (key for table in tables for key in table.foreign_keys),
        key=lambda key: (tables.index(key.parent.table), key.parent.name),
    )
    inside = [key for key in keys if largest not in (key.parent.table, key.column.table)]
    left = [boxes[table.name] for table in tables if table is not largest]
    begin = 26 + _LANE * len(inside)
    top = 2
    for box in left:
        box.left, box.top = begin, top
        box.width = max(each.width for each in left)
        top += box.height + _SPACE
    gap = begin + left[0].width + 26
    right = boxes[largest.name]
    right.left = gap + _LANE * (len(keys) - len(inside) - 1) + 26
    right.top = max(2, (top - _SPACE - right.height) // 2)
    width = right.right + 2
    height = max(box.top + box.height for box in boxes.values()) + 2
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img">',
        "<title>The tables, and what refers to what</title>",
        f"<style>{_STYLE}</style>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        *_references(keys, boxes, begin - 22, gap),
        *(line for box in boxes.values() for line in box.drawn()),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"
