"""Memory bandwidth of the fused operations beside PyTorch eager, torch.compile and Liger-Kernel, in one run.

    python benchmarks/fused.py --budget 240 --output fused.json

Each figure is the median of `triton.testing.do_bench`, as GB/s of the bytes that must move at least. A result that
breaks the tolerance rule gets no figure but the word "wrong" with the reason. The copy of a 1 GB tensor says what the
card gives. Cases that the time budget does not reach are listed as not run.
"""

import argparse
import importlib.metadata
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn_plus.fused.activation import SwiGLU
from flash_attn_plus.fused.cross_entropy import cross_entropy
from flash_attn_plus.fused.norm_autograd import NormFunction
from flash_attn_plus.fused.rotary import apply_rotary
from flash_attn_plus.testing import assert_close

try:
    from liger_kernel.transformers import functional as liger
except ImportError:
    liger = None

DEVICE = "cuda"
FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, ImportError)
Function = Callable[..., Tensor]


class Case(NamedTuple):
    """One operation at one size.

    `checked` are the rows, the first ones, that are held to float64; None means all.
    """

    name: str
    tensors: tuple[Tensor, ...]
    formula: Function  # plain PyTorch; in float64 it is the truth
    providers: dict[str, Function]
    forward_bytes: int
    backward_bytes: int
    checked: int | None = None
    inseparable: frozenset[str] = frozenset()  # providers whose forward pass already makes the gradient


def _normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype).requires_grad_()


def _with_liger(providers: dict[str, Function], function: Function) -> dict[str, Function]:
    return providers if liger is None else {**providers, "liger": function}


def norm_case(rows: int, cols: int, is_rms_norm: bool) -> Case:
    """RMS norm, or layer norm with a bias."""
    x, weight, bias = _normal(rows, cols), _normal(cols), _normal(cols)
    eps = 1e-6

    def ours(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        extra = (None,) * 4
        return NormFunction.apply(x, weight, bias, *extra, eps, 0.0, None, False, False, False, is_rms_norm)

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (cols,), weight, eps)

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (cols,), weight, bias, eps)

    size = x.nbytes
    if is_rms_norm:
        providers = _with_liger({"ours": ours}, lambda x, w: liger.liger_rms_norm(x, w, eps, in_place=False))
        return Case(f"rms_norm {rows}x{cols}", (x, weight), rms, providers, 2 * size, 3 * size)
    providers = _with_liger({"ours": ours}, lambda x, w, b: liger.liger_layer_norm(x, w, b, eps))
    return Case(f"layer_norm {rows}x{cols}", (x, weight, bias), layer, providers, 2 * size, 3 * size)


def cross_entropy_case(rows: int, classes: int) -> Case:
    """Losses of every row."""
    logits, labels = _normal(rows, classes), torch.randint(0, classes, (rows,), device=DEVICE)

    def formula(logits: Tensor) -> Tensor:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide, labels[: logits.shape[0]], reduction="none")

    def ours(logits: Tensor) -> Tensor:
        return cross_entropy(logits, labels)[0]

    providers = _with_liger({"ours": ours}, lambda x: liger.liger_cross_entropy(x, labels, reduction="none"))
    name = f"cross_entropy {rows}x{classes}"
    size = logits.nbytes
    return Case(name, (logits,), formula, providers, size, 2 * size, checked=64, inseparable=frozenset({"liger"}))


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
    """One tensor of 32 heads of 128, all features turned."""
    x = _normal(1, tokens, heads, dim)
    angles = torch.arange(tokens, device=DEVICE)[:, None] * 10000.0 ** (-torch.arange(dim // 2, device=DEVICE) / 64)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()

    def formula(x: Tensor) -> Tensor:
        c, s = (t.to(x.dtype)[:, None] for t in (cos, sin))
        x0, x1 = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
        y = x0 * c - x1 * s, x0 * s + x1 * c
        return torch.stack(y, -1).flatten(-2) if interleaved else torch.cat(y, -1)

    def lig(x: Tensor) -> Tensor:
        q = x.transpose(1, 2)
        tables = (torch.cat((t, t), -1)[None] for t in (cos, sin))
        return liger.liger_rope(q, q[:, :1].detach(), *tables)[0].transpose(1, 2)

    providers = {"ours": lambda x: _Rotary.apply(x, cos, sin, interleaved)}
    providers = providers if interleaved else _with_liger(providers, lig)
    name = f"rotary {'pairs' if interleaved else 'halves'} {tokens}"
    return Case(name, (x,), formula, providers, 2 * x.nbytes, 2 * x.nbytes)


def swiglu_case(rows: int, cols: int) -> Case:
    """Contiguous gate and value."""
    gate, up = _normal(rows, cols), _normal(rows, cols)
    providers = _with_liger({"ours": SwiGLU.apply}, lambda g, u: liger.liger_swiglu(g, u))
    size = gate.nbytes
    return Case(
        f"swiglu {rows}x{cols}", (gate, up), lambda g, u: F.silu(g) * u, providers, 3 * size, 5 * size, checked=256
    )


def all_cases() -> Iterator[tuple[str, Callable[[], Case]]]:
    """Names and makers, the most telling first, so that a short budget reaches them."""
    for cols in (4096, 8192, 16384, 2048, 1024):
        rows = min(65536, (1 << 27) // cols)
        yield f"rms_norm {cols}", lambda r=rows, c=cols: norm_case(r, c, True)
        yield f"layer_norm {cols}", lambda r=rows, c=cols: norm_case(r, c, False)
    for classes in (128256, 32000, 256000, 50257):
        rows = (1 << 30) // classes // 256 * 256
        yield f"cross_entropy {classes}", lambda r=rows, c=classes: cross_entropy_case(r, c)
    for tokens in (16384, 65536, 1024):
        for interleaved in (False, True):
            yield f"rotary {tokens}", lambda t=tokens, i=interleaved: rotary_case(t, i)
    yield "swiglu", lambda: swiglu_case(16384, 14336)


def _results(function: Function, tensors: tuple[Tensor, ...], dout: Tensor | None) -> tuple[Tensor, ...]:
    """Output and gradients, from copies of the inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*(x * 1 for x in leaves))  # some overwrite their inputs
    dout = torch.ones_like(out) if dout is None else dout.to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def _edge(x: Tensor, rows: int | None, total: int) -> Tensor:
    """The first rows of what has one entry a row; all of anything else."""
    return x if rows is None or x.shape[0] != total else x[:rows]


def wrong(case: Case, function: Function, dout: Tensor | None) -> str | None:
    """Why the function's results break the tolerance rule; None when they keep it."""
    total = case.tensors[0].shape[0]
    actual = [_edge(x, case.checked, total) for x in _results(function, case.tensors, dout)]
    few = tuple(_edge(x, case.checked, total) for x in case.tensors)
    dout_few = None if dout is None else _edge(dout, case.checked, total)
    truth = _results(case.formula, tuple(x.double() for x in few), dout_few)
    eager = _results(case.formula, few, dout_few)
    try:
        for i, triple in enumerate(zip(actual, truth, eager, strict=True)):
            assert_close("output" if i == 0 else f"gradient {i}", *triple)
    except AssertionError as e:
        return str(e)
    return None


def measure(case: Case, function: Function, is_separable: bool) -> dict[str, float]:
    """Milliseconds of the forward pass, of the backward pass and of both, or of both alone."""
    from triton.testing import do_bench

    def median(run: Callable[[], object]) -> float:
        return do_bench(run, warmup=20, rep=80, return_mode="median")

    copies = [x.detach().clone().requires_grad_() for x in case.tensors]
    out = function(*copies)
    dout = torch.randn_like(out)
    took = {"both_ms": median(lambda: torch.autograd.grad(function(*copies), copies, dout))}
    if is_separable:
        with torch.no_grad():
            took["forward_ms"] = median(lambda: function(*copies))
        took["backward_ms"] = median(lambda: torch.autograd.grad(out, copies, dout, retain_graph=True))
    return took


def run_case(case: Case) -> dict[str, dict]:
    """The figures of every provider, or why there is none."""
    torch._dynamo.reset()
    providers = {**case.providers, "eager": case.formula, "compile": torch.compile(case.formula, dynamic=False)}
    out_shape = case.formula(*(x.detach()[:1] if case.checked else x.detach() for x in case.tensors))
    dout = None if out_shape.ndim == 1 else torch.randn_like(case.tensors[0])
    rows = {}
    for name, function in providers.items():
        try:
            reason = wrong(case, function, dout)
            if reason:
                rows[name] = {"wrong": reason}
                continue
            took = measure(case, function, name not in case.inseparable)
        except FAILURES as e:
            rows[name] = {"failed": f"{type(e).__name__}: {e}"[:300]}
            continue
        moved = {"forward": case.forward_bytes, "backward": case.backward_bytes}
        moved["both"] = sum(moved.values())
        rates = {f"{p}_gbps": moved[p] / took[f"{p}_ms"] / 1e6 for p in moved if f"{p}_ms" in took}
        rows[name] = took | rates
    return rows


def copy_gbps() -> float:
    """Bytes read and written a second by a device copy."""
    from triton.testing import do_bench

    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / do_bench(lambda: target.copy_(source), return_mode="median") / 1e6


def versions() -> dict[str, str]:
    """Packages that take part."""
    names = ("torch", "triton", "liger-kernel")
    return {n: importlib.metadata.version(n) for n in names if n != "liger-kernel" or liger is not None}


def show(name: str, rows: dict[str, dict], copy: float) -> None:
    """One line a provider."""
    print(name)
    for provider, row in rows.items():
        if "both_gbps" in row:
            rates = (row.get(f"{p}_gbps") for p in ("forward", "backward", "both"))
            figures = (f"{'-':>13}" if rate is None else f"{rate:6.0f} ({rate / copy:4.0%})" for rate in rates)
            print(f"  {provider:<8}" + "  ".join(figures), flush=True)
        else:
            print(f"  {provider:<8}" + "; ".join(f"{k}: {v}" for k, v in row.items()), flush=True)


def main() -> None:
    """Run what fits into the budget and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=240.0, help="seconds after which no further case starts")
    parser.add_argument("--only", default="", help="regular expression on the names of cases")
    parser.add_argument("--output", type=Path, default=Path("fused.json"))
    arguments = parser.parse_args()
    start = time.monotonic()
    torch.manual_seed(0)
    copy = copy_gbps()
    report = {
        "device": torch.cuda.get_device_name(), "versions": versions(), "copy_gbps": copy, "cases": {}, "not_run": [],
    }  # fmt: skip
    print(f"{report['device']}, {report['versions']}, copy {copy:.0f} GB/s; GB/s (of copy): forward, backward, both")
    for name, make in all_cases():
        if not re.search(arguments.only, name):
            continue
        if time.monotonic() - start > arguments.budget:
            report["not_run"].append(name)
            continue
        case = make()
        report["cases"][case.name] = run_case(case)
        show(case.name, report["cases"][case.name], copy)
        arguments.output.write_text(json.dumps(report, indent=1))
        del case
        torch.cuda.empty_cache()
    print("not run:", ", ".join(report["not_run"]) or "nothing")
    arguments.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
