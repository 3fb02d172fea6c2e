"""Rows as text: aligned for a terminal, in Markdown, as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def table(rows: Sequence[Row]) -> str:
    """Rows with the same keys as aligned columns: numbers to the right, text to the left, None as a dash."""
    cells, numeric = _cells(rows)
    widths = [max(len(line[i]) for line in cells) for i in range(len(numeric))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    )


def markdown(rows: Sequence[Row]) -> str:
    """Rows with the same keys as a table in Markdown, with a line break at its end."""
    (head, *body), numeric = _cells(rows)
    rule = ["---:" if right else "---" for right in numeric]
    return "".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in (head, rule, *body)
    )


def comma_separated(rows: Sequence[Row]) -> str:
    """Rows with the same keys as CSV: numbers in full, None as an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def flatten(value: Row, prefix: str = "") -> list[tuple[str, str]]:
    """The leaves of nested dictionaries: dotted keys, and values as text."""
    lines: list[tuple[str, str]] = []
    for key, inner in value.items():
        if isinstance(inner, dict):
            lines += flatten(inner, f"{prefix}{key}.")
        else:
            lines.append((f"{prefix}{key}", cell(inner)))
    return lines


def cell(value: Any) -> str:
    """One value as text."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {cell(inner)}" for key, inner in value.items()) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(cell(inner) for inner in value) or "-"
    return str(value)


def _cells(rows: Sequence[Row]) -> tuple[list[list[str]], list[bool]]:
    columns = list(rows[0])
    cells = [columns] + [[cell(row[column]) for column in columns] for row in rows]
    return cells, [all(isinstance(row[c], int | float | None) for row in rows) for c in columns]
