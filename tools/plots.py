"""The documentation's pictures, drawn from the results files, each for a light and a dark page."""

import io
import textwrap
from collections.abc import Callable

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.results import Results, cells, find

INKS = {"light": {"ink": "#24292f", "grid": "#d8dee4"}, "dark": {"ink": "#e6e6e6", "grid": "#4a4f5a"}}
# Ours in warm colours, others in cold ones; every pair is told apart by lightness too.
COLOURS = {
    "gluon": "#e4572e", "triton": "#f3a712", "flash_attn_plus": "#e4572e", "cuDNN (SDPA)": "#2e86ab",
    "FA2 (SDPA)": "#8fb8de", "FA3": "#b39ddb", "FA4": "#7e57c2", "FlexAttention": "#76949f", "FlagGems": "#b8c5d6",
    "torch.compile": "#2e86ab", "Liger-Kernel": "#8fb8de", "PyTorch": "#76949f", "SDPA": "#2e86ab",
}  # fmt: skip


def _style(axes: Axes, ink: str, grid: str) -> None:
    axes.grid(axis="y", color=grid, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=ink, length=0)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(grid)
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
        text.set_color(ink)


def _rank(provider: str) -> int:
    return list(COLOURS).index(provider) if provider in COLOURS else len(COLOURS)


def _bars(axes: Axes, results: Results, suite: str, metric: str, keep: Callable[[str], bool], skip: str = "") -> None:
    rows = [r for r in results.select(suite, metric) if keep(r.case) and r.provider != skip]
    numbers, providers = cells(rows), sorted({row.provider for row in rows}, key=lambda name: (_rank(name), name))
    width = 0.84 / len(providers)
    for i, provider in enumerate(providers):
        places = [at + (i - (len(providers) - 1) / 2) * width for at in range(len(numbers))]
        heights = [values.get(provider) or 0.0 for values in numbers.values()]
        axes.bar(places, heights, width * 0.92, label=provider, color=COLOURS.get(provider, "#999999"))
    axes.set_xticks(range(len(numbers)), [textwrap.fill(case, 12) for case in numbers])
    axes.set_ylabel(rows[0].unit)


def _legend(figure: Figure, ink: str) -> None:
    """One legend above all panels."""
    found: dict = {}
    for axes in figure.axes:
        found |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        found.values(), found.keys(), loc="outside upper center", ncols=6, frameon=False, labelcolor=ink, fontsize=11
    )


def attention(files: list[Results], axes: list[Axes]) -> None:
    """Forward and backward throughput beside other libraries."""
    for place, metric in zip(axes, ("forward", "backward"), strict=True):
        _bars(place, find("attention", metric, files), "attention", metric, lambda case: True)
        place.set_title(f"attention, {metric}")


def hopper(files: list[Results], axes: list[Axes]) -> None:
    """The Hopper kernels over sequence lengths, causal."""
    for place, (metric, dim) in zip(
        axes, [(m, d) for m in ("forward", "backward") for d in (64, 128, 256)], strict=True
    ):
        rows = find("hopper", metric, files).select("hopper", metric)
        for provider in ("gluon", "FA4", "FA3", "cuDNN (SDPA)", "FA2 (SDPA)"):
            chosen = [r for r in rows if r.provider == provider and r.case.startswith(f"d{dim} causal s") and r.value]
            points = sorted((int(r.case.split(" s")[1]), r.value) for r in chosen)
            if points:
                place.plot(*zip(*points, strict=True), marker="o", label=provider, color=COLOURS[provider])
        place.set_xscale("log", base=2)
        lengths = sorted({int(r.case.split(" s")[1]) for r in rows if r.case.startswith(f"d{dim} causal s")})
        place.set_xticks(lengths, [str(n) for n in lengths])
        place.minorticks_off()
        place.set_ylim(0, None)
        place.set_title(f"{metric}, head dim {dim}, causal")
        place.set_ylabel("TFLOP/s")


def decode(files: list[Results], axes: list[Axes]) -> None:
    """Bytes of keys and values that one decode step reads each second."""
    results = find("decode", "read", files)
    _bars(axes[0], results, "decode", "read", lambda case: case.count(" ") == 2)
    axes[0].set_title("decode, sequences x keys of each")
    _bars(axes[1], results, "decode", "read", lambda case: "pages" in case)
    axes[1].set_title("decode from pages")


def fused(files: list[Results], axes: list[Axes]) -> None:
    """Forward and backward of norms, rotary embedding and cross-entropy, beside a copy."""
    for place, suite in zip(axes, ("rms_norm", "layer_norm", "cross_entropy", "rotary"), strict=True):
        results = find(suite, "both", files)
        _bars(place, results, suite, "both", lambda case: True, skip="copy")
        limit = max(row.value for row in results.select(suite, "both") if row.provider == "copy")
        place.axhline(limit, color="#6aa84f", linewidth=1.5, linestyle=(0, (4, 2)), label="a copy")
        place.set_title(f"{suite}, forward + backward")


# name -> (draw, rows and columns of panels, size in inches)
PICTURES: dict[str, tuple[Callable, tuple[int, int], tuple[float, float]]] = {
    "attention": (attention, (2, 1), (11, 7.5)),
    "hopper": (hopper, (2, 3), (11, 6.5)),
    "decode": (decode, (2, 1), (11, 7.5)),
    "fused": (fused, (2, 2), (11, 7.5)),
}


def draw(name: str, scheme: str, files: list[Results]) -> bytes:
    """One picture as SVG on a transparent ground; scheme is "light" or "dark"."""
    paint, (rows, columns), size = PICTURES[name]
    settings = {"font.size": 10, "svg.fonttype": "none", "svg.hashsalt": name, "axes.titlepad": 10}
    with plt.rc_context(settings):
        figure, panels = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
        figure.get_layout_engine().set(h_pad=0.1)
        axes = list(panels.flat)
        paint(files, axes)
        for place in axes:
            _style(place, **INKS[scheme])
        _legend(figure, INKS[scheme]["ink"])
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    return buffer.getvalue()
