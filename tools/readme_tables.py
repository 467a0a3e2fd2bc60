"""Fill the generated parts of README.md and README_CN.md: the support matrix and one table of benchmarks.

Numbers come from benchmarks/results only, through `tools.results`, the matrix from the tests' through `tools.support`.
"""

import argparse
import sys
from pathlib import Path

from tools import results, support

# file -> language
READMES = {results.ROOT / "README.md": "en", results.ROOT / "README_CN.md": "zh"}
MARKS = {
    "matrix": ("<!-- matrix: written by `make readme`; do not edit -->", "<!-- end of matrix -->"),
    "results": ("<!-- results: written by `make readme`; do not edit -->", "<!-- end of results -->"),
}
SUITE, PROVIDERS = "hopper", ("gluon", "FA4", "FA3", "cuDNN (SDPA)", "FA2 (SDPA)")
LENGTHS = ("s2048", "s8192")
MEASURED = {"en": "Measured on {}.", "zh": "测量环境：{}。"}  # noqa: RUF001 - Chinese punctuation


def benchmarks(files: list[results.Results], language: str) -> list[str]:
    """Attention, forward and backward in one table, and where it was measured; nothing when it was not."""
    try:
        shown = results.find(SUITE, "forward", files)
    except KeyError:
        return []
    rows = [row for row in shown.rows if row.provider in PROVIDERS and row.case.endswith(LENGTHS)]
    table = results.table(shown._replace(rows=rows), SUITE, ["forward", "backward"])
    return [*table, "", MEASURED[language].format(shown.origin())]


def filled(text: str, parts: dict[str, list[str]]) -> str:
    """The text with the lines between each pair of marks replaced."""
    for name, lines in parts.items():
        begin, end = MARKS[name]
        before, rest = text.split(begin + "\n")
        _, after = rest.split(end)
        inside = "\n".join(["", *lines, "", ""]) if lines else ""
        text = f"{before}{begin}\n{inside}{end}{after}"
    return text


def current(path: Path) -> str:
    """What the file should be."""
    language, text = READMES[path], path.read_text(encoding="utf-8")
    parts = {"matrix": support.table(language), "results": benchmarks(results.load(), language)}
    return filled(text, parts)


def main() -> int:
    """Write both, or with --check only say whether they are up to date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when one is out of date")
    check = parser.parse_args().check
    stale = [path for path in READMES if current(path) != path.read_text(encoding="utf-8")]
    for path in stale:
        print(f"{path.name} is out of date: run `make readme`")
        if not check:
            path.write_text(current(path), encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
