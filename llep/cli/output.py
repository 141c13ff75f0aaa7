"""What commands print: tables for people, json, yaml and csv for scripts."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from enum import IntEnum, StrEnum
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

TYPED_AGAIN = ("id", "revision")  # columns of numbers that name something: other commands take them, without commas


class ExitCode(IntEnum):
    OK = 0
    ERROR = 1
    USAGE = 2
    UNREACHABLE = 3
    CHECK_FAILED = 4


class Format(StrEnum):
    TABLE = "table"
    JSON = "json"
    YAML = "yaml"
    CSV = "csv"


def fail(message: str, code: ExitCode = ExitCode.ERROR) -> int:
    """Print one line on standard error and return the exit code."""
    print(f"llep: {message}", file=sys.stderr)
    return int(code)


def show(rows: Sequence[Mapping[str, Any]], format: Format, *, data: Any = None, title: str | None = None) -> None:
    """Print rows as a table or csv; json and yaml print `data` where given (the whole answer), else the rows."""
    whole = rows if data is None else data
    if format is Format.JSON:
        json.dump(whole, sys.stdout, indent=2)
        print()
    elif format is Format.YAML:
        yaml.safe_dump(whole, sys.stdout, sort_keys=False)
    elif format is Format.CSV:
        writer = csv.DictWriter(sys.stdout, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
    else:
        _print_table(rows, title)


def _print_table(rows: Sequence[Mapping[str, Any]], title: str | None) -> None:
    if not rows:
        print("nothing to show")
        return
    # Text, since brackets and colons in what people wrote are neither markup nor emoji.
    heading = None if title is None else Text(title, style="table.title")
    table = Table(title=heading, title_justify="left", box=None, pad_edge=False)
    for column in rows[0]:
        is_number = all(isinstance(row[column], int | float) for row in rows)
        table.add_column(Text(column), justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(value) if column in TYPED_AGAIN else _cell(value)) for column, value in row.items()))
    # A pipe has no width: nothing is folded there.
    Console(width=None if sys.stdout.isatty() else 1000).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
