"""The picture: both loss curves, and attention memory against sequence length."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from demo.memory import Peaks

STYLES = {
    "flash_attn": {"color": "#1f6fb2", "linewidth": 3.0},
    "standard": {"color": "#e07b1a", "linewidth": 1.5, "linestyle": (0, (4, 2))},  # thinner: the curves coincide
}


def _label_length(length: int) -> str:
    return f"{length // 1024}k" if length >= 1024 else str(length)


def save(path: Path, losses: dict[str, list[float]], memory: dict[str, Peaks], training: str, attention: str) -> None:
    """Write a PNG; `training` and `attention` say in words what each panel measured."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), facecolor="white", layout="constrained")
    for name, values in losses.items():
        left.plot(range(1, len(values) + 1), values, label=name, **STYLES[name])
    left.set(xlabel="step", ylabel="loss (nats per byte)", xlim=(1, None))
    left.set_title(f"Training loss\n{training}", fontsize=11)
    for name, peaks in memory.items():
        measured = {n: peak / 1e6 for n, peak in peaks.items() if peak is not None}
        lengths, megabytes = list(measured), list(measured.values())
        right.plot(lengths, megabytes, marker="o", label=name, **STYLES[name])
        right.annotate(
            f"{megabytes[-1]:,.1f} MB", (lengths[-1], megabytes[-1]), xytext=(0, 9), textcoords="offset points",
            ha="right", color=STYLES[name]["color"],
        )  # fmt: skip
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.yaxis.set_major_formatter("{x:,g}")
    right.margins(y=0.12)
    lengths = list(next(iter(memory.values())))
    right.set_xticks(lengths, [_label_length(n) for n in lengths])
    right.minorticks_off()
    right.set(xlabel="sequence length", ylabel="peak memory (MB)")
    right.set_title(f"Memory of attention, forward + backward\n{attention}", fontsize=11)
    for axes in (left, right):
        axes.grid(color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
