"""Attention on the CPU beside PyTorch's scaled_dot_product_attention: python benchmarks/cpu.py [name ...]

Both sides get the same (batch, seqlen, heads, head_dim) tensors and must agree before they are timed. They run in
turns; what is reported is the median time of each and the median of the ratio within a turn, so that other load on the
machine falls on both. A case ends when the ratio is known to 1 % or after half a minute. With OMP_NUM_THREADS=1
the time is the thread's CPU time, which other load hardly touches; with more threads it is wall time, and a machine
with other work on it favours the side with fewer parallel regions.
"""

import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import flash_attn_plus
from flash_attn_plus import attention, use_backend

RESULTS = Path(__file__).parent / "results"
SECONDS = 30.0
TURNS = (5, 200)
KNOWN_TO = 0.01
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


def clock_name() -> str:
    """CPU time for one thread, wall time for more."""
    return "cpu" if torch.get_num_threads() == 1 else "wall"


class Case(NamedTuple):
    """One comparison; window is (left, right) as in `attention`, for which SDPA needs a boolean mask."""

    seqlen: int
    head_dim: int
    dtype: torch.dtype
    causal: bool = False
    backward: bool = False
    window: tuple[int, int] | None = None
    heads: int = 8
    heads_k: int = 8

    @property
    def name(self) -> str:
        band = f"window{self.window[0]}_{self.window[1]}" if self.window else "causal" if self.causal else "full"
        grouped = f"_kv{self.heads_k}" if self.heads_k != self.heads else ""
        direction = "train" if self.backward else "forward"
        return f"{direction}_{band}_{self.seqlen}_d{self.head_dim}_{str(self.dtype).removeprefix('torch.')}{grouped}"


def cases() -> list[Case]:
    """Lengths 1k to 8k, full and causal, both directions; grouped heads, float16, and a window."""
    floats = (torch.float32, torch.bfloat16)
    found = [
        Case(seqlen, 64, dtype, causal, backward)
        for seqlen in (1024, 2048, 4096, 8192)
        for dtype in floats
        for causal in (False, True)
        for backward in (False, True)
        if causal or seqlen < 8192
    ]
    found += [Case(2048, 128, dtype, True, backward) for dtype in floats for backward in (False, True)]
    found += [Case(2048, 64, torch.float32, True, backward, heads_k=2) for backward in (False, True)]
    found += [Case(1024, 64, torch.float16, True, backward) for backward in (False, True)]
    found += [Case(8192, 64, dtype, window=(256, 0), backward=b) for dtype in floats for b in (False, True)]
    return found


def sides(case: Case) -> tuple[Callable[[], tuple[Tensor, ...]], Callable[[], tuple[Tensor, ...]]]:
    """Ours and PyTorch's: functions that return the outputs to compare, out or the three gradients."""
    random = torch.Generator().manual_seed(0)

    def normal(heads: int) -> Tensor:
        return torch.randn((1, case.seqlen, heads, case.head_dim), generator=random).to(case.dtype)

    q, dout = normal(case.heads).requires_grad_(case.backward), normal(case.heads)
    k, v = (normal(case.heads_k).requires_grad_(case.backward) for _ in range(2))
    mask = None
    if case.window is not None:
        distance = torch.arange(case.seqlen) - torch.arange(case.seqlen)[:, None]
        mask = (distance >= -case.window[0]) & (distance <= case.window[1])

    def sdpa() -> Tensor:
        options = {"is_causal": case.causal, "attn_mask": mask, "enable_gqa": case.heads != case.heads_k}
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), **options).transpose(1, 2)

    def ours() -> Tensor:
        return attention(q, k, v, causal=case.causal, window_size=case.window or (-1, -1))

    def finished(forward: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        if case.backward:
            return lambda: torch.autograd.grad(forward(), (q, k, v), dout)
        return lambda: (forward(),)

    return finished(ours), finished(sdpa)


def check(case: Case, ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    """Raise unless both sides agree to a few rounding units of the largest value."""
    for mine, other in zip(ours, theirs, strict=True):
        scale = torch.finfo(case.dtype).eps * other.abs().max().item()
        error = (mine.double() - other.double()).abs().max().item()
        if not error <= 16 * scale:
            raise SystemExit(f"{case.name}: the sides differ by {error:.2e}, {error / scale:.0f} rounding units")


def spread(values: list[float]) -> float:
    """Relative standard error of the median, from the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return 1.25 * (high - low) / 1.35 / math.sqrt(len(values)) / middle


def measure(case: Case) -> dict[str, object]:
    """Time both sides in turns, each turn starting with the other one."""
    pair = sides(case)
    check(case, *(side() for side in pair))
    times: tuple[list[float], list[float]] = ([], [])
    ratios: list[float] = []
    clock, end = CLOCKS[clock_name()], time.perf_counter() + SECONDS
    while len(ratios) < TURNS[0] or (
        len(ratios) < TURNS[1] and spread(ratios) > KNOWN_TO and time.perf_counter() < end
    ):
        for side in (0, 1) if len(ratios) % 2 else (1, 0):
            begin = clock()
            pair[side]()
            times[side].append(clock() - begin)
        ratios.append(times[0][-1] / times[1][-1])
    return {
        "name": case.name,
        "ours_ms": round(statistics.median(times[0]) * 1e3, 3),
        "sdpa_ms": round(statistics.median(times[1]) * 1e3, 3),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_spread": round(spread(ratios), 4),
        "turns": len(ratios),
    }


def processor() -> str:
    """The processor's name, as the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def main(names: list[str]) -> None:
    """Measure the named cases, or all, print them, and store a complete run."""
    chosen = [case for case in cases() if not names or case.name in names]
    if unknown := set(names) - {case.name for case in chosen}:
        raise SystemExit(f"unknown cases {', '.join(sorted(unknown))}; known: {', '.join(c.name for c in cases())}")
    rows = []
    with use_backend("torch"):
        for case in chosen:
            rows.append(measure(case))
            print("{name:<42} ours {ours_ms:>9.2f} ms   SDPA {sdpa_ms:>9.2f} ms   ratio {ratio:.3f}".format(**rows[-1]))
            sys.stdout.flush()
    if not names:
        threads = torch.get_num_threads()
        machine = {
            "device": processor(), "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": threads, "clock": clock_name(), "load_average": round(os.getloadavg()[0], 1),
            "torch": torch.__version__, "python": platform.python_version(),
            "flash_attn_plus": flash_attn_plus.__version__,
            "command": f"OMP_NUM_THREADS={threads} python benchmarks/cpu.py",
        }  # fmt: skip
        RESULTS.mkdir(parents=True, exist_ok=True)
        name = "cpu" if threads == 1 else f"cpu-{threads}-threads"
        (RESULTS / f"{name}.json").write_text(json.dumps(machine | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
