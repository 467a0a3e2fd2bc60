"""The results files, the only place from which the documentation takes numbers.

A file holds {"device": str, "versions": {name: version}, "rows": [row, ...]}, a row {"suite", "case", "provider",
"metric", "value", "unit"}; a value of null says that the provider does not serve the case.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "results"


class Row(NamedTuple):
    """One number, or None where the provider does not serve the case."""

    suite: str
    case: str
    provider: str
    metric: str
    value: float | None
    unit: str


class Results(NamedTuple):
    """One file."""

    path: Path
    device: str
    versions: dict[str, str]
    rows: list[Row]

    def origin(self) -> str:
        """Device, versions and file in a line of Markdown."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{self.device} ({versions}), `benchmarks/results/{self.path.name}`"

    def kinds(self) -> list[tuple[str, str]]:
        """Every (suite, metric), in the order in which they were measured."""
        return list(dict.fromkeys((row.suite, row.metric) for row in self.rows))

    def select(self, suite: str, metric: str) -> list[Row]:
        """The rows of one kind; raises KeyError without any."""
        chosen = [row for row in self.rows if (row.suite, row.metric) == (suite, metric)]
        if not chosen:
            raise KeyError(f"{self.path.name} has no row of suite {suite!r} and metric {metric!r}")
        return chosen


def _rows(content: dict[str, Any]) -> list[Row]:
    if content["rows"] and "ours_ms" in content["rows"][0]:  # benchmarks/cpu.py: two sides measured in turns
        sides = (("flash_attn_plus", "ours_ms"), ("SDPA", "sdpa_ms"))
        threads = content.get("threads", 1)
        suite = "cpu" if threads == 1 else f"cpu, {threads} threads"
        return [
            Row(suite, row["name"].replace("_", " "), provider, "time", row[key], "ms")
            for row in content["rows"]
            for provider, key in sides
        ]
    return [Row(**{name: row[name] for name in Row._fields}) for row in content["rows"]]


def load(folder: Path = FOLDER) -> list[Results]:
    """Every file, in the order of their names."""
    found = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        versions = content.get("versions") or {name: content[name] for name in ("python", "torch") if name in content}
        found.append(Results(path, content["device"], versions, _rows(content)))
    return found


def find(suite: str, metric: str, files: list[Results]) -> Results:
    """The first file with such rows; raises KeyError without any."""
    for results in files:
        if (suite, metric) in results.kinds():
            return results
    raise KeyError(f"no results file has rows of suite {suite!r} and metric {metric!r}")


def value(suite: str, case: str, provider: str, metric: str, files: list[Results]) -> tuple[float, str]:
    """One number and its unit; raises KeyError when it was not measured."""
    for row in find(suite, metric, files).select(suite, metric):
        if (row.case, row.provider) == (case, provider) and row.value is not None:
            return row.value, row.unit
    raise KeyError(f"no number for {suite!r}, {case!r}, {provider!r}, {metric!r}")


def shown(number: float | None) -> str:
    """Three digits."""
    if number is None:
        return "-"
    if number == 0 or abs(number) >= 100:
        return f"{number:,.0f}"
    return f"{number:.3g}"


def cells(rows: list[Row]) -> dict[str, dict[str, float | None]]:
    """case -> provider -> number."""
    table: dict[str, dict[str, float | None]] = {}
    for row in rows:
        table.setdefault(row.case, {})[row.provider] = row.value
    return table


def table(results: Results, suite: str, metrics: list[str]) -> list[str]:
    """A Markdown table, cases down and providers across; several metrics of one unit share the cells."""
    kinds = [results.select(suite, metric) for metric in metrics]
    (unit,) = {row.unit for rows in kinds for row in rows}
    told = {row.provider for rows in kinds for row in rows}
    in_order = dict.fromkeys(row.provider for row in results.rows if row.suite == suite)  # alike in every table of it
    providers = [provider for provider in in_order if provider in told]
    numbers = [cells(rows) for rows in kinds]
    lines = [
        f"| {suite}, {' / '.join(metrics)} ({unit}) | {' | '.join(providers)} |",
        f"| --- |{' --: |' * len(providers)}",
    ]
    for case in dict.fromkeys(case for part in numbers for case in part):
        shares = [" / ".join(shown(part.get(case, {}).get(p)) for part in numbers) for p in providers]
        lines.append(f"| {case} | {' | '.join(shares)} |")
    return lines
