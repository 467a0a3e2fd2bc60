"""Attention on Hopper over the 36 cells of the FlashAttention papers, packed documents and a window, beside others.

16,384 tokens and 2,048 features in all, bf16, random data. Providers take turns in every round, so that a drift of the
clock meets all of them; a number is the median of the rounds. Backward counts 2.5 times the forward's operations, a
window 1,025 keys a row. No number is printed for a wrong result.

Several processes may prepare their shares side by side (--head-dims, --masks) and time one after the other (--lock).
"""

import argparse
import fcntl
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import flash_attn_plus
from benchmarks.gpu import FEATURES, TOKENS, is_right
from benchmarks.providers import FACTORIES, PACKED, WINDOWED, Attention, Packed, Windowed, available, serving
from benchmarks.record import RESULTS, Record

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
PROVIDERS = ("gluon", "FA4", "FA3", "cuDNN (SDPA)", "FA2 (SDPA)")
WINDOW = 1024
REFERENCE = "FA2 (SDPA)"
REPEATABLE = "gluon, deterministic"
ROUNDS = 5
Calls = dict[str, Callable[[], Any]]


class Cell(NamedTuple):
    """One case: its calls by provider, and the operations of its forward pass in TFLOP."""

    case: str
    forward: Calls
    backward: Calls
    work: float


def milliseconds(calls: Calls, budget: float = 1.5) -> dict[str, float]:
    """Medians of rounds in which providers take turns, each for about `budget` ms a round."""
    event = lambda: torch.cuda.Event(enable_timing=True)  # noqa: E731
    repeats, found = {}, {name: [] for name in calls}
    for name, call in calls.items():
        call()
        start, end = event(), event()
        start.record()
        call(), call()
        end.record()
        torch.cuda.synchronize()
        repeats[name] = max(2, min(30, int(2 * budget / start.elapsed_time(end))))
    names = list(calls)
    for i in range(ROUNDS if names else 0):
        at = i % len(names)
        for name in names[at:] + names[:at]:
            start, end = event(), event()
            calls[name]()
            start.record()
            for _ in range(repeats[name]):
                calls[name]()
            end.record()
            torch.cuda.synchronize()
            found[name].append(start.elapsed_time(end) / repeats[name])
    return {name: statistics.median(times) for name, times in found.items()}


def _check(case: str, name: str, found: tuple[Tensor, ...], expected: dict[int, tuple[Tensor, ...]]) -> None:
    """End the program when results differ from those that the first provider gave, output or gradients."""
    first = expected.setdefault(len(found), found)
    if not all(map(is_right, found, first)):
        raise SystemExit(f"{name}, or the first provider, is wrong on {case}")


def _passes(case: str, runs: dict[str, Callable[..., Tensor]], tensors: list[Tensor], work: float) -> Cell:
    """The passes of those providers that serve the case."""
    *inputs, dout = tensors
    cell, expected = Cell(case, {}, {}, work), {}
    for name in sorted(runs, key=lambda name: name != REFERENCE):
        run, leaves, backend = runs[name], [x.detach().requires_grad_() for x in inputs], name.partition(",")[0]

        def forward(run=run, backend=backend) -> Tensor:
            with torch.no_grad(), serving(backend):
                return run(*inputs)

        def backward(out: Tensor, leaves=leaves, backend=backend) -> tuple[Tensor, ...]:
            with serving(backend):
                return torch.autograd.grad(out, leaves, dout, retain_graph=True)

        try:
            _check(case, name, (forward(),), expected)
            cell.forward[name] = forward
            with serving(backend):
                out = run(*leaves)
            _check(case, name, backward(out), expected)
            cell.backward[name] = partial(backward, out)
        except (RuntimeError, NotImplementedError, TypeError, AttributeError, AssertionError) as error:
            print(f"{case}: {name} does not serve all: {type(error).__name__}: {str(error)[:100]}", flush=True)
    in_order = ({n: calls[n] for n in runs if n in calls} for calls in (cell.forward, cell.backward))
    return Cell(case, *in_order, work)


def dense(head_dim: int, causal: bool, length: int, runs: dict[str, Attention]) -> Cell:
    """A cell of the grid; ours also with a bitwise repeatable dq."""
    shape = (TOKENS // length, length, FEATURES // head_dim, head_dim)
    tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    calls = {name: lambda q, k, v, run=run: run(q, k, v, causal) for name, run in runs.items()}
    if "gluon" in runs:
        calls[REPEATABLE] = lambda q, k, v: flash_attn_plus.attention(q, k, v, causal=causal, deterministic=True)
    work = 4 * TOKENS * length * FEATURES * (0.5 if causal else 1.0) * 1e-12
    cell = _passes(f"d{head_dim} {'causal' if causal else 'full'} s{length}", calls, tensors, work)
    cell.forward.pop(REPEATABLE, None)  # it is the same
    return cell


def documents(runs: dict[str, Packed]) -> Cell:
    """64 packed documents of 128 to 4,096 tokens."""
    lengths = torch.randint(128, 4097, (64,), generator=torch.Generator().manual_seed(0))
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().cuda()
    shape = (int(lengths.sum()), FEATURES // 128, 128)
    tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    longest = int(lengths.max())
    calls = {name: lambda q, k, v, run=run: run(q, k, v, starts, longest) for name, run in runs.items()}
    work = 2 * float((lengths.double() ** 2).sum()) * FEATURES * 1e-12
    return _passes("varlen, 64 documents of 128 to 4096, d128 causal", calls, tensors, work)


def window(runs: dict[str, Windowed]) -> Cell:
    """A causal window over one long sequence."""
    tensors = [torch.randn(1, TOKENS, FEATURES // 128, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    calls = {name: lambda q, k, v, run=run: run(q, k, v, WINDOW) for name, run in runs.items()}
    work = 4 * TOKENS * (WINDOW + 1) * FEATURES * 1e-12
    return _passes(f"window {WINDOW}, d128 s{TOKENS}", calls, tensors, work)


def _makers(names: list[str], head_dims: list[int], masks: list[str], lengths: list[int]) -> list[Callable[[], Cell]]:
    plain, packed, windowed = (available(names, table) for table in (FACTORIES, PACKED, WINDOWED))
    found: list[Callable[[], Cell]] = [
        lambda d=d, m=m, s=s: dense(d, m == "causal", s, plain)
        for s in lengths for d in head_dims for m in masks if m in ("full", "causal")
    ]  # fmt: skip
    others = {"packed": lambda: documents(packed), "window": lambda: window(windowed)}
    return found + [make for mask, make in others.items() if mask in masks]


def main() -> None:
    """Run the cells of this process's share."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "h200-hopper.json")
    parser.add_argument("--providers", default=",".join(PROVIDERS))
    parser.add_argument("--head-dims", default="64,128,256")
    parser.add_argument("--masks", default="full,causal,packed,window")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--lock", default=os.devnull, help="a file: held by many while they prepare, by one that times")
    given = parser.parse_args()
    numbers = [[int(x) for x in text.split(",")] for text in (given.head_dims, given.lengths)]
    torch.manual_seed(0)
    makers = _makers(given.providers.split(","), numbers[0], given.masks.split(","), numbers[1])
    with open(given.lock, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        for make in makers:
            make()
        torch.cuda.synchronize()
        fcntl.flock(lock, fcntl.LOCK_EX)
        record = Record(given.out, torch.cuda.get_device_name(), [["hopper", "forward"], ["hopper", "backward"]])
        for make in makers:
            cell = make()
            suite = "hopper" if cell.case.startswith("d") else "hopper, other work"
            for metric, calls, factor in (("forward", cell.forward, 1.0), ("backward", cell.backward, 2.5)):
                for name, ms in milliseconds(calls).items():
                    record.add(suite, cell.case, name, metric, factor * cell.work / ms * 1e3, "TFLOP/s")


if __name__ == "__main__":
    main()
