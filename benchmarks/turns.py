"""Cells of attention benchmarks: providers take turns in every round, so that a drift of the clock meets all of them.

16,384 tokens and 2,048 features in all, bf16, random data: the grid of the FlashAttention papers. A number is the
median of the rounds; backward counts 2.5 times the forward's operations. No number is printed for a wrong result.

Several processes may prepare their shares side by side and time one after the other: --lock names a file for that.
"""

import argparse
import fcntl
import os
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import flash_attn_plus
from benchmarks.providers import Attention, serving
from benchmarks.record import Record

TOKENS, FEATURES = 16384, 2048
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


def is_right(out: Tensor, reference: Tensor) -> bool:
    """Whether two 16-bit results agree."""
    error = (out.float() - reference.float()).norm() / reference.float().norm()
    return bool(error < 1e-2)


def _check(case: str, name: str, found: tuple[Tensor, ...], expected: dict[int, tuple[Tensor, ...]]) -> None:
    """End the program when results differ from those that the first provider gave, output or gradients."""
    first = expected.setdefault(len(found), found)
    if not all(map(is_right, found, first)):
        raise SystemExit(f"{name}, or the first provider, is wrong on {case}")


def passes(case: str, runs: dict[str, Callable[..., Tensor]], tensors: list[Tensor], work: float) -> Cell:
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
    cell = passes(f"d{head_dim} {'causal' if causal else 'full'} s{length}", calls, tensors, work)
    cell.forward.pop(REPEATABLE, None)  # it is the same
    return cell


def add_arguments(parser: argparse.ArgumentParser, providers: str, lengths: str) -> None:
    """The options of a process's share of the cells."""
    parser.add_argument("--providers", default=providers)
    parser.add_argument("--head-dims", default="64,128,256")
    parser.add_argument("--lengths", default=lengths)
    parser.add_argument("--lock", default=os.devnull, help="a file: held by many while they prepare, by one that times")


def grid(given: argparse.Namespace, masks: list[str], runs: dict[str, Attention]) -> list[Callable[[], Cell]]:
    """The makers of the dense cells that were asked for."""
    head_dims, lengths = ([int(x) for x in text.split(",")] for text in (given.head_dims, given.lengths))
    return [
        lambda d=d, m=m, s=s: dense(d, m == "causal", s, runs)
        for s in lengths for d in head_dims for m in masks if m in ("full", "causal")
    ]  # fmt: skip


def measure(makers: list[Callable[[], Cell]], lock_path: str, record: Record, suite: str, other_suite: str) -> None:
    """Prepare all cells, wait for the turn of this process, and record the dense ones and the others."""
    with open(lock_path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        for make in makers:
            make()
        torch.cuda.synchronize()
        fcntl.flock(lock, fcntl.LOCK_EX)
        for make in makers:
            cell = make()
            for metric, calls, factor in (("forward", cell.forward, 1.0), ("backward", cell.backward, 2.5)):
                for name, ms in milliseconds(calls).items():
                    value = factor * cell.work / ms * 1e3
                    record.add(
                        suite if cell.case.startswith("d") else other_suite, cell.case, name, metric, value, "TFLOP/s"
                    )
