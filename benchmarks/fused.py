"""Fused operations on a GPU beside a plain copy, PyTorch, torch.compile and Liger-Kernel: memory speed and host cost.

Speed is the bytes that must move at least over device time: the queue is filled behind a 2 GB memset, which also
empties the caches, so host time does not count. The provider "copy" moves the same bytes by `Tensor.copy_`; at small
sizes it shows what a launch costs. Host cost is the time of a call on a tiny problem, nobody waiting for the device.
No number is printed for a wrong result.
"""

import argparse
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from triton import TritonError

from benchmarks.record import RESULTS, Record
from flash_attn_plus.fused.cross_entropy import cross_entropy
from flash_attn_plus.fused.norm_autograd import NormFunction
from flash_attn_plus.fused.rotary import apply_rotary

try:
    from liger_kernel.transformers import functional as liger
except ImportError:
    liger = None

OURS, EAGER, COMPILED, LIGER, COPY = "flash_attn_plus", "PyTorch", "torch.compile", "Liger-Kernel", "copy"
FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, TritonError)
ELEMENTS = 1 << 27  # of a norm's input: 256 MB, several times what caches hold
Function = Callable[..., Tensor]


class Case(NamedTuple):
    """One operation at one size; `formula` is plain PyTorch, and in float32 the truth."""

    suite: str
    name: str
    tensors: tuple[Tensor, ...]
    formula: Function
    ours: Function
    liger: Function | None
    forward_bytes: int
    backward_bytes: int
    checked: int | None = None  # rows, the first ones, that are held to the truth; None means all
    is_liger_separable: bool = True  # False where its forward pass already makes the gradient


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


def norm_case(rows: int, cols: int, is_rms_norm: bool) -> Case:
    """RMS norm, or layer norm with a bias."""
    x, weight, bias = _normal(rows, cols), _normal(cols), _normal(cols)
    eps, size, name = 1e-6, x.nbytes, f"{rows:,} x {cols:,}"
    if is_rms_norm:
        return Case(
            "rms_norm", name, (x, weight), lambda x, w: F.rms_norm(x, (cols,), w, eps),
            lambda x, w: NormFunction.apply(x, w, None, *(None,) * 4, eps, 0.0, None, False, False, False, True),
            lambda x, w: liger.liger_rms_norm(x, w, eps, in_place=False), 2 * size, 3 * size,
        )  # fmt: skip
    return Case(
        "layer_norm", name, (x, weight, bias), lambda x, w, b: F.layer_norm(x, (cols,), w, b, eps),
        lambda x, w, b: NormFunction.apply(x, w, b, *(None,) * 4, eps),
        lambda x, w, b: liger.liger_layer_norm(x, w, b, eps), 2 * size, 3 * size,
    )  # fmt: skip


def cross_entropy_case(rows: int, classes: int) -> Case:
    """Losses of every row."""
    logits, labels = _normal(rows, classes), torch.randint(0, classes, (rows,), device="cuda")
    return Case(
        "cross_entropy", f"{rows:,} x {classes:,}", (logits,),
        lambda x: F.cross_entropy(x.float(), labels[: x.shape[0]], reduction="none"),
        lambda x: cross_entropy(x, labels)[0],
        lambda x: liger.liger_cross_entropy(x, labels, reduction="none"),
        logits.nbytes, 2 * logits.nbytes, checked=64, is_liger_separable=False,
    )  # fmt: skip


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return apply_rotary(x, cos, sin, interleaved=interleaved)

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor, None, None, None]:
        return apply_rotary(dout, *ctx.saved_tensors, interleaved=ctx.interleaved, conjugate=True), None, None, None


def rotary_case(tokens: int, interleaved: bool, heads: int = 32, dim: int = 128) -> Case:
    """One tensor of 32 heads of 128, all features turned; Liger-Kernel turns halves only, in place."""
    x = _normal(1, tokens, heads, dim)
    angles = torch.arange(tokens, device="cuda")[:, None] * 10000.0 ** (-torch.arange(dim // 2, device="cuda") / 64)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()

    def formula(x: Tensor) -> Tensor:
        c, s = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
        x0, x1 = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
        y = x0 * c - x1 * s, x0 * s + x1 * c
        return torch.stack(y, -1).flatten(-2) if interleaved else torch.cat(y, -1)

    one_key = torch.zeros(1, 1, tokens, dim, device="cuda", dtype=x.dtype)
    tables = [torch.cat((t, t), -1)[None] for t in (cos, sin)]

    def by_liger(x: Tensor) -> Tensor:
        return liger.liger_rope(x.transpose(1, 2), one_key, *tables)[0].transpose(1, 2)

    return Case(
        "rotary", f"{tokens:,} tokens, {'pairs' if interleaved else 'halves'}", (x,), formula,
        lambda x: _Rotary.apply(x, cos, sin, interleaved), None if interleaved else by_liger,
        2 * x.nbytes, 2 * x.nbytes,
    )  # fmt: skip


def cases() -> Iterator[Callable[[], Case]]:
    """Makers of the measured cases."""
    for cols in (1024, 4096, 8192, 16384):
        for is_rms_norm in (True, False):
            yield partial(norm_case, ELEMENTS // cols, cols, is_rms_norm)
    for classes in (32000, 50257, 128256, 256000):
        yield partial(cross_entropy_case, (1 << 29) // classes // 128 * 128, classes)
    for tokens, interleaved in ((1024, False), (16384, False), (65536, False), (16384, True)):
        yield partial(rotary_case, tokens, interleaved)


def tiny_cases() -> Iterator[Callable[[], Case]]:
    """Makers of problems on which only the host's work counts."""
    yield partial(norm_case, 16, 256, True)
    yield partial(norm_case, 16, 256, False)
    yield partial(cross_entropy_case, 64, 256)
    yield partial(rotary_case, 16, False)


def _results(function: Function, tensors: tuple[Tensor, ...], dout: Tensor | None) -> list[Tensor]:
    """Output and gradients, from copies of the inputs: some providers overwrite theirs."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*(x * 1 for x in leaves))
    dout = torch.ones_like(out) if dout is None else dout.to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def _refusal(case: Case, function: Function) -> str | None:
    """Why a provider's figures do not count; None when its results are right."""
    rows = case.checked or case.tensors[0].shape[0]
    first = (case.tensors[0][:rows], *case.tensors[1:])
    dout = None if case.checked else torch.randn_like(case.tensors[0])
    truth = _results(case.formula, tuple(x.float() for x in first), dout)
    try:
        results = _results(function, case.tensors, dout)
    except FAILURES as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    for actual, expected in zip(results, truth, strict=True):
        error = ((actual[: expected.shape[0]].float() - expected).norm() / expected.norm()).item()
        if not error < 1e-2:
            return f"wrong, relative error {error:.1e}"
    return None


class Clock:
    """Device time of calls."""

    def __init__(self) -> None:
        self._scratch = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")

    def milliseconds(self, run: Callable, prepare: Callable = lambda: None, repeats: int = 16) -> float:
        """The median of the repeats of run(prepare())."""
        for _ in range(3):
            run(prepare())
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            prepared = prepare()
            self._scratch.zero_()
            start.record()
            run(prepared)
            end.record()
        torch.cuda.synchronize()
        return median(start.elapsed_time(end) for start, end in events)


class _Passes:
    """What is timed of a function."""

    def __init__(self, case: Case, function: Function):
        self._leaves = [x.detach().clone().requires_grad_() for x in case.tensors]
        self._function = function
        self._dout = torch.randn_like(self.forward())

    def forward(self, _: object = None) -> Tensor:
        return self._function(*self._leaves)

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, self._leaves, self._dout)

    def both(self, _: object = None) -> tuple[Tensor, ...]:
        return self.backward(self.forward())

    def milliseconds(self, metric: str, clock: Clock) -> float:
        if metric == "backward":
            return clock.milliseconds(self.backward, self.forward)
        return clock.milliseconds(getattr(self, metric))


def _providers(case: Case) -> dict[str, Function]:
    torch._dynamo.reset()
    found = {OURS: case.ours, EAGER: case.formula, COMPILED: torch.compile(case.formula, dynamic=False)}
    return found if liger is None or case.liger is None else {**found, LIGER: case.liger}


def speed(record: Record, case: Case, clock: Clock) -> None:
    """GB/s of every provider, forward, backward and both after each other."""
    moved = {"forward": case.forward_bytes, "backward": case.backward_bytes}
    moved["both"] = sum(moved.values())
    for metric, size in moved.items():
        source = torch.empty(size // 2, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        took = clock.milliseconds(target.copy_, lambda source=source: source)
        record.add(case.suite, case.name, COPY, metric, size / took / 1e6, "GB/s")
    for name, function in _providers(case).items():
        refusal = _refusal(case, function)
        if refusal and name == OURS:
            raise SystemExit(f"{case.suite} {case.name}: {refusal}")
        if refusal:
            print(f"{name} does not serve {case.suite} {case.name}: {refusal}", flush=True)
        passes = None if refusal else _Passes(case, function)
        for metric, size in moved.items():
            is_measured = passes and (metric == "both" or name != LIGER or case.is_liger_separable)
            value = size / passes.milliseconds(metric, clock) / 1e6 if is_measured else None
            record.add(case.suite, case.name, name, metric, value, "GB/s")


def host_cost(record: Record, case: Case) -> None:
    """Microseconds of host time of a call, alone and with its backward pass."""
    for name, function in _providers(case).items():
        passes = _Passes(case, function)
        for metric in ("forward", "both"):
            run = getattr(passes, metric)
            best = float("inf")
            for _ in range(6):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(100):
                    run()
                best = min(best, (time.perf_counter() - start) / 100)
            record.add("host", case.suite, name, metric, best * 1e6, "us")


def main() -> None:
    """Measure on the current GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="regular expression on suite and case, for example 'norm.*1,024$'")
    parser.add_argument("--seconds", type=float, default=540.0, help="stop starting new cases after this long")
    arguments = parser.parse_args()
    until = time.time() + arguments.seconds
    device = torch.cuda.get_device_name()
    path = arguments.out or RESULTS / f"{device.split()[-1].lower()}-fused.json"
    record = Record(path, device, [])
    torch.manual_seed(0)
    clock = Clock()
    for make in cases():
        if time.time() < until:
            case = make()
            if re.search(arguments.only, f"{case.suite} {case.name}"):
                speed(record, case, clock)
    for make in tiny_cases():
        case = make()
        if re.search(arguments.only, f"host {case.suite}"):
            host_cost(record, case)


if __name__ == "__main__":
    main()
