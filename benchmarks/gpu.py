"""Attention on a GPU: throughput beside other libraries, host cost of a call, first call, memory.

The throughput is measured as `benchmarks.turns` says.
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

import flash_attn_plus
from benchmarks.providers import FACTORIES, available
from benchmarks.record import RESULTS, Record
from benchmarks.turns import add_arguments, grid, measure

PROVIDERS = "triton,gluon,FA2 (SDPA),cuDNN (SDPA),FlexAttention,FlagGems"
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
    """Seconds of the first forward and backward of a fresh process, import included; empty cache, then warm.

    A cache holds what Triton compiles and Python's byte code, whatever the environment says of either.
    """
    with tempfile.TemporaryDirectory() as cache:
        where = {"TRITON_CACHE_DIR": f"{cache}/triton", "PYTHONPYCACHEPREFIX": f"{cache}/python"}
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | where
        for state in ("empty cache", "warm cache"):
            done = subprocess.run(
                [sys.executable, "-c", FIRST_CALL], env=environment,
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


SUITES = {"host": host_cost, "first call": first_call, "memory": memory}


def main() -> None:
    """Run the suites on the current GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--suites", default=",".join(("attention", *SUITES)))
    parser.add_argument("--masks", default="causal,full")
    add_arguments(parser, PROVIDERS, "2048,8192")
    given = parser.parse_args()
    name = torch.cuda.get_device_name()
    path = given.out or RESULTS / f"{name.lower().replace(' ', '-')}.json"
    readme = [["attention", "forward"], ["attention", "backward"], ["host", "eager call"], ["first call", "forward"]]
    record = Record(path, name, readme)
    torch.manual_seed(0)
    for suite in given.suites.split(","):
        if suite == "attention":
            runs = available(given.providers.split(","), FACTORIES)
            measure(grid(given, given.masks.split(","), runs), given.lock, record, suite, suite)
        else:
            SUITES[suite](record)


if __name__ == "__main__":
    main()
