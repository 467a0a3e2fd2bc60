"""Attention on Hopper over the 36 cells of the FlashAttention papers, packed documents and a window, beside others.

A window counts 1,025 keys a row; the rest is as `benchmarks.turns` says.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.providers import FACTORIES, PACKED, WINDOWED, Packed, Windowed, available
from benchmarks.record import RESULTS, Record
from benchmarks.turns import FEATURES, TOKENS, Cell, add_arguments, grid, measure, passes

PROVIDERS = "gluon,FA4,FA3,cuDNN (SDPA),FA2 (SDPA)"
WINDOW = 1024


def documents(runs: dict[str, Packed]) -> Cell:
    """64 packed documents of 128 to 4,096 tokens."""
    lengths = torch.randint(128, 4097, (64,), generator=torch.Generator().manual_seed(0))
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().cuda()
    shape = (int(lengths.sum()), FEATURES // 128, 128)
    tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    longest = int(lengths.max())
    calls = {name: lambda q, k, v, run=run: run(q, k, v, starts, longest) for name, run in runs.items()}
    work = 2 * float((lengths.double() ** 2).sum()) * FEATURES * 1e-12
    return passes("varlen, 64 documents of 128 to 4096, d128 causal", calls, tensors, work)


def window(runs: dict[str, Windowed]) -> Cell:
    """A causal window over one long sequence."""
    tensors = [torch.randn(1, TOKENS, FEATURES // 128, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    calls = {name: lambda q, k, v, run=run: run(q, k, v, WINDOW) for name, run in runs.items()}
    work = 4 * TOKENS * (WINDOW + 1) * FEATURES * 1e-12
    return passes(f"window {WINDOW}, d128 s{TOKENS}", calls, tensors, work)


def main() -> None:
    """Run the cells of this process's share."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "h200-hopper.json")
    parser.add_argument("--masks", default="full,causal,packed,window")
    add_arguments(parser, PROVIDERS, "512,1024,2048,4096,8192,16384")
    given = parser.parse_args()
    names, masks = given.providers.split(","), given.masks.split(",")
    plain, packed, windowed = (available(names, table) for table in (FACTORIES, PACKED, WINDOWED))
    others: dict[str, Callable[[], Cell]] = {"packed": lambda: documents(packed), "window": lambda: window(windowed)}
    torch.manual_seed(0)
    makers = grid(given, masks, plain) + [make for mask, make in others.items() if mask in masks]
    record = Record(given.out, torch.cuda.get_device_name(), [["hopper", "forward"], ["hopper", "backward"]])
    measure(makers, given.lock, record, "hopper", "hopper, other work")


if __name__ == "__main__":
    main()
