"""Fill the README's results section from benchmarks/results/*.json, the only place its numbers come from.

A results file is shown when it says so: {"readme": [[suite, metric], ...], "device": str, "versions": {name: version},
"rows": [row, ...]} with rows of {"suite", "case", "provider", "metric", "value", "unit"}; "readme" chooses and orders
its tables. Files without "readme" are data only, and without any to show the section is empty.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- results: written by `make readme` from benchmarks/results; do not edit -->"
END = "<!-- end of results -->"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _table(rows: list[dict[str, Any]], suite: str, metric: str) -> list[str]:
    """One Markdown table, cases down and providers across, in the order in which they were measured."""
    chosen = [row for row in rows if (row["suite"], row["metric"]) == (suite, metric)]
    if not chosen:
        raise KeyError(f'no row of suite {suite!r} has metric {metric!r}; mend the results file\'s "readme" list')
    (unit,) = {row["unit"] for row in chosen}
    providers = list(dict.fromkeys(row["provider"] for row in chosen))
    cells: dict[str, dict[str, float | None]] = {}
    for row in chosen:
        cells.setdefault(row["case"], {})[row["provider"]] = row["value"]
    return [
        f"| {suite}, {metric} ({unit}) | {' | '.join(providers)} |",
        f"| --- |{' --: |' * len(providers)}",
        *(
            f"| {case} | {' | '.join(_number(values.get(provider)) for provider in providers)} |"
            for case, values in cells.items()
        ),
    ]


def section(folder: Path) -> str:
    """The text between the markers: a heading and the tables of each results file; empty when none is shown."""
    lines: list[str] = []
    for path in sorted(folder.glob("*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        if not results.get("readme"):
            continue
        versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        lines += ["", f"Measured on {results['device']} ({versions}), `benchmarks/results/{path.name}`:"]
        for suite, metric in results["readme"]:
            lines += ["", *_table(results["rows"], suite, metric)]
    return "\n".join(["## Numbers", *lines, ""]) if lines else ""


def filled(readme: str, folder: Path) -> str:
    """The README with its results section regenerated."""
    before, rest = readme.split(BEGIN + "\n")
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{section(folder)}{END}{after}"


def main() -> int:
    """Write the README, or with --check only say whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the README is out of date")
    check = parser.parse_args().check
    old = README.read_text(encoding="utf-8")
    new = filled(old, RESULTS)
    if check:
        print("README.md is up to date" if new == old else "README.md is out of date: run `make readme`")
        return int(new != old)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
