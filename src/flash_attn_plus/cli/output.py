"""What commands print: plain tables and JSON on stdout, progress on stderr.

A table never loses text: in a terminal the last column is wrapped to the width, in a pipe a row is one line.
Control codes appear only where stderr is a terminal and `rich`, an optional package, draws the progress bar.
"""

import argparse
import importlib
import json
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import groupby
from typing import Any

_LEAST_LAST_COLUMN = 24
_SECONDS_BETWEEN_LINES = 5.0


def say(*lines: str) -> None:
    """Print lines to stdout now, wrapped to a terminal's width."""
    width = _width()
    for line in lines:
        indent = " " * (len(line) - len(line.lstrip()))
        if width is not None and len(line) > width:
            line = "\n".join(_wrapped(line, width, indent + "  "))
        print(line, flush=True)


def print_json(content: Any) -> None:
    """Print one object for machines."""
    print(json.dumps(content, indent=1, default=str), flush=True)


def _width() -> int | None:
    """The columns of the terminal on stdout; None where it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Print rows under headers, the columns named in `right` to the right."""
    for line in table_lines(headers, rows, right, _width()):
        print(line, flush=True)


def print_pairs(content: Mapping[str, object]) -> None:
    """Print names and values below a title, indented."""
    widest = max(len(name) for name in content)
    for line in table_lines(["  " + " " * widest, ""], [(f"  {k}", str(v)) for k, v in content.items()], (), _width())[
        1:
    ]:
        print(line, flush=True)


def table_lines(
    headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = (), width: int | None = None
) -> list[str]:
    """The lines of a table whose last column is wrapped to a width, if there is one."""
    every = [list(headers), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in every) for i in range(len(headers))]
    before = sum(widths[:-1]) + 2 * (len(headers) - 1)
    room = None if width is None else max(_LEAST_LAST_COLUMN, width - before)
    lines = []
    for row in every:
        parts = [row[-1]] if room is None else _wrapped(row[-1], room)
        cells = [
            cell.rjust(n) if name in right else cell.ljust(n)
            for cell, n, name in zip(row[:-1], widths[:-1], headers[:-1], strict=True)
        ]
        for number, part in enumerate(parts or [""]):
            last = part.rjust(widths[-1]) if headers[-1] in right else part
            lead = "  ".join(cells) if number == 0 else " " * (before - 2)
            lines.append((f"{lead}  {last}" if cells else last).rstrip())
    return lines


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """Lines of whole words: paths and options stay in one piece, to be copied."""
    return textwrap.wrap(text, width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


class Help(argparse.HelpFormatter):
    """Help whose description keeps its paragraphs, and its examples, which are indented, as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines: list[str] = []
        for is_example, group in groupby(text.splitlines(), lambda line: line.startswith("  ") or not line.strip()):
            block = list(group)
            lines += block if is_example else _wrapped(" ".join(block), width, indent)
        return "\n".join(lines)


class Progress(AbstractContextManager):
    """How far long work is, on stderr: a bar where `rich` and a terminal are there, else a line now and then."""

    def __init__(self, label: str, total: int):
        self._label, self._total, self._done, self._told = label, total, 0, time.monotonic()
        self._what = ""
        self._bar: Any = None
        if sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):  # there rich would show nothing
            try:
                self._bar = _rich_bar(importlib.import_module("rich.progress"), importlib.import_module("rich.console"))
            except ImportError:
                self._bar = None

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=self._total, what="")
        else:
            print(f"{self._label}: {self._total} step{'s'[: self._total != 1]}", file=sys.stderr, flush=True)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def starts(self, what: str) -> None:
        """Tell which step comes next."""
        self._what = what
        if self._bar is not None:
            self._bar.update(self._task, what=what)

    def advance(self) -> None:
        """One step is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.advance(self._task)
            return
        now = time.monotonic()
        if now - self._told >= _SECONDS_BETWEEN_LINES:
            self._told = now
            print(f"{self._label}: {self._done} of {self._total} {self._what}".rstrip(), file=sys.stderr, flush=True)


def _rich_bar(progress: Any, console: Any) -> Any:
    columns = (
        progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(), progress.TextColumn("{task.fields[what]}"),
    )  # fmt: skip
    return progress.Progress(*columns, console=console.Console(stderr=True), transient=True)
