"""Attention on a GPU: throughput beside other libraries, host cost of a call, first call, memory.

16,384 tokens and 2,048 features in all, bf16, random data: the grid of the FlashAttention papers. Backward counts
2.5 times the forward's operations. No number is printed for a wrong result.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from triton.testing import do_bench

import flash_attn_plus
from benchmarks.providers import FACTORIES, Attention, available, serving
from benchmarks.record import RESULTS, Record

TOKENS, FEATURES = 16384, 2048
FIRST_CALL = """
import json, time, torch
q = torch.randn(2, 2048, 16, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
(q.detach() @ q.detach().transpose(-1, -2)).sum().item()
start = time.perf_counter()
import flash_attn
out = flash_attn.flash_attn_func(q, q, q, causal=True)
torch.cuda.synchronize()
forward = time.perf_counter()
out.sum().backward()
torch.cuda.synchronize()
print(json.dumps([forward - start, time.perf_counter() - forward]))
"""


def is_right(out: torch.Tensor, reference: torch.Tensor) -> bool:
    """Whether two 16-bit results agree."""
    error = (out.float() - reference.float()).norm() / reference.float().norm()
    return bool(error < 1e-2)


def _inputs(head_dim: int, length: int) -> list[torch.Tensor]:
    shape = (TOKENS // length, length, FEATURES // head_dim, head_dim)
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]


def _throughput(run: Attention, causal: bool, tensors: list[torch.Tensor], backward: bool) -> float | None:
    """TFLOP/s, median of the repeats, or None when the provider does not serve the case."""
    q, k, v, dout = tensors
    batch, length, heads, head_dim = q.shape
    work = 4 * batch * heads * length**2 * head_dim * (0.5 if causal else 1.0) * 1e-9
    try:
        if not backward:
            return work / do_bench(lambda: run(q, k, v, causal), warmup=25, rep=100, return_mode="median")
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = run(*leaves, causal)
        step = lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)  # noqa: E731
        return 2.5 * work / do_bench(step, warmup=25, rep=100, return_mode="median")
    except (RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
        print(f"  not served: {type(error).__name__}: {str(error)[:100]}", flush=True)
        return None


def throughput(record: Record, providers: dict[str, Attention], lengths: list[int], until: float) -> None:
    """Forward and backward TFLOP/s of every provider on every case."""
    for head_dim in (128, 64, 256):
        for length in lengths:
            for causal in (True, False):
                if time.time() > until:
                    return
                tensors = _inputs(head_dim, length)
                reference = FACTORIES["FA2 (SDPA)"]()(*tensors[:3], causal)
                case = f"d{head_dim} s{length} {'causal' if causal else 'full'}"
                for name, run in providers.items():
                    for direction in ("forward", "backward"):
                        with serving(name):
                            value = _throughput(run, causal, tensors, direction == "backward")
                            if value is not None and not is_right(run(*tensors[:3], causal), reference):
                                raise SystemExit(f"{name} is wrong on {case}")
                        record.add("attention", case, name, direction, value, "TFLOP/s")


def host_cost(record: Record) -> None:
    """Microseconds of host time of one eager call on a tiny problem, beside SDPA's."""
    from flash_attn import flash_attn_func

    q, k, v = (torch.randn(1, 128, 8, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    calls = {
        "flash_attn_func": lambda: flash_attn_func(q, k, v, causal=True),
        "SDPA": lambda: torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
        ),
    }
    for with_gradients in (False, True):
        for x in (q, k, v):
            x.requires_grad_(with_gradients)
        for name, call in calls.items():
            best = float("inf")
            for _ in range(8):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(200):
                    call()
                best = min(best, (time.perf_counter() - start) / 200)
            case = "1x128x8x64, with gradients" if with_gradients else "1x128x8x64, without gradients"
            record.add("host", case, name, "eager call", best * 1e6, "us")


def first_call(record: Record) -> None:
    """Seconds of the first forward and backward of a fresh process, import included; empty cache, then warm."""
    with tempfile.TemporaryDirectory() as cache:
        for state in ("empty cache", "warm cache"):
            done = subprocess.run(
                [sys.executable, "-c", FIRST_CALL], env={**os.environ, "TRITON_CACHE_DIR": cache},
                capture_output=True, text=True, timeout=300, check=True,
            )  # fmt: skip
            forward, backward = json.loads(done.stdout.strip().splitlines()[-1])
            record.add("first call", state, "flash_attn", "forward", forward, "s")
            record.add("first call", state, "flash_attn", "backward", backward, "s")


def memory(record: Record) -> None:
    """Peak bytes beyond inputs and outputs of one call over 65,536 tokens, per token and head."""
    for with_gradients in (False, True):
        x = [torch.randn(1, 65536, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
        leaves = [t.requires_grad_(with_gradients) for t in x[:3]]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = flash_attn_plus.attention(*leaves, causal=True)
        kept = out.numel() * 2
        if with_gradients:
            torch.autograd.grad(out, leaves, x[3])
            kept += 3 * x[0].numel() * 2
        peak = (torch.cuda.max_memory_allocated() - before - kept) / (65536 * 4)
        del out  # else the next round counts it as there before and gone at the peak
        record.add("memory", "forward and backward" if with_gradients else "forward", "auto", "scratch", peak, "bytes")


def main() -> None:
    """Run the suites on the current GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--providers", default=",".join(FACTORIES))
    parser.add_argument("--lengths", default="2048,8192")
    parser.add_argument("--seconds", type=float, default=540.0, help="stop starting new cases after this long")
    arguments = parser.parse_args()
    until = time.time() + arguments.seconds
    name = torch.cuda.get_device_name()
    path = arguments.out or RESULTS / f"{name.lower().replace(' ', '-')}.json"
    readme = [["attention", "forward"], ["attention", "backward"], ["host", "eager call"], ["first call", "forward"]]
    record = Record(path, name, readme)
    torch.manual_seed(0)
    host_cost(record)
    first_call(record)
    memory(record)
    providers = available(arguments.providers.split(","), FACTORIES)
    throughput(record, providers, [int(x) for x in arguments.lengths.split(",")], until)


if __name__ == "__main__":
    main()
