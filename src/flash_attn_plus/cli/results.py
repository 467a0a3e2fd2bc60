"""Rows of a benchmark: as a CSV file, beside an earlier one, and as a plot."""

import csv
import importlib.util
import math
from pathlib import Path
from typing import Any, NamedTuple

from flash_attn_plus.errors import InvalidArgument


class Row(NamedTuple):
    """One provider on one case; the numbers are None unless the status is "ok"."""

    suite: str
    case: str
    dtype: str
    provider: str
    status: str  # ok, wrong, not served, not run
    ms: float | None = None
    tflops: float | None = None
    gbps: float | None = None
    roofline_percent: float | None = None
    told: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What makes rows of two runs the same measurement."""
        return self.suite, self.case, self.dtype, self.provider


def write_csv(path: Path, rows: list[Row], about: dict[str, Any]) -> None:
    """Write the rows, each with the columns of `about` (device, versions, rates of the machine)."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*Row._fields, *about])
        writer.writeheader()
        for row in rows:
            writer.writerow({k: "" if v is None else v for k, v in row._asdict().items()} | about)


def read_csv(path: Path) -> tuple[dict[tuple[str, str, str, str], float], str]:
    """The times of an earlier run by key, and its device; raises InvalidArgument for a file that is none."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if not rows or not set(Row._fields) <= rows[0].keys():
            raise InvalidArgument(f"--against {path} is no result of `flash-attn-plus bench --csv`; write one with it")
        times = {(r["suite"], r["case"], r["dtype"], r["provider"]): float(r["ms"]) for r in rows if r["ms"]}
        for ms in times.values():
            if not 0 < ms < math.inf:
                raise ValueError(f"a time of {ms} ms")
    except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:
        if isinstance(error, InvalidArgument):
            raise
        raise InvalidArgument(f"--against {path} cannot be read ({error}); write one with `bench --csv`") from error
    return times, rows[0].get("device") or "an unknown device"


def check_output(option: str, path: Path) -> None:
    """Raise InvalidArgument, before anything is measured, when a file cannot be written; makes its folder."""
    is_new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise InvalidArgument(f"{option} {path} cannot be written ({error.strerror}); name another file") from error
    if is_new:
        path.unlink()


def check_plot(path: Path) -> None:
    """Raise InvalidArgument, before anything is measured, when a plot cannot be drawn or written."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidArgument(
            "--plot needs matplotlib, which is not installed; install it (pip install matplotlib), or use --csv"
        )
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise InvalidArgument(f"--plot {path} should end in .png, .pdf or .svg")
    check_output("--plot", path)


def plot(path: Path, rows: list[Row], title: str) -> None:
    """Groups of bars, percent of the roofline: a picture a suite, a group a case, a bar a provider."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [r for r in rows if r.status == "ok"]
    suites, providers = list(dict.fromkeys(r.suite for r in rows)), list(dict.fromkeys(r.provider for r in rows))
    figure = Figure(figsize=(11, 3.2 * max(1, len(suites))), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes: Any = figure.subplots(len(suites), squeeze=False)[:, 0] if suites else []
    for axis, suite in zip(axes, suites, strict=True):
        cases = list(dict.fromkeys(r.case for r in rows if r.suite == suite))
        width = 0.8 / max(1, len(providers))
        for n, provider in enumerate(providers):
            mine = [r for r in rows if (r.suite, r.provider) == (suite, provider)]
            at = [cases.index(r.case) + (n - (len(providers) - 1) / 2) * width for r in mine]
            axis.bar(at, [r.roofline_percent for r in mine], width, label=provider, color=f"C{n}")
        axis.set_title(suite)
        axis.set_ylabel("% of the roofline")
        axis.set_xticks(range(len(cases)), cases)
        axis.set_xlim(-0.5, len(cases) - 0.5)
    if suites:
        axes[0].legend(fontsize="small", ncols=3)
    figure.savefig(path)
