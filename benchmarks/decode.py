"""Decode steps over a key/value cache on a GPU: time under CUDA-graph replay, and the host's time of an eager call.

bf16, random data, one query token unless told; the rate counts the bytes of keys and values that a step must read.
The cache is cold: what the replay needs is flushed from the device's cache before each. No number for a wrong result.
"reading alone" is a kernel that loads the same bytes once and does nothing with them: what the memory allows.
"""

import argparse
import os
import time
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from flash_attn import flash_attn_with_kvcache
from torch.nn.attention import SDPBackend
from triton.testing import do_bench

from benchmarks.record import RESULTS, Record
from flash_attn_plus import attention_with_kvcache
from flash_attn_plus.cli import providers

CONTEXTS = ((1, 8192), (1, 131072), (16, 8192), (64, 8192), (128, 2048), (8, 65536))
E4M3 = torch.float8_e4m3fn
Step = Callable[[], torch.Tensor]


@triton.jit
def _reading_kernel(k_ptr, v_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    largest = tl.max(tl.maximum(tl.load(k_ptr + at).to(tl.float32), tl.load(v_ptr + at).to(tl.float32)), 0)
    if largest > 1e30:  # never; so that the loads are not left out
        tl.store(out_ptr, largest)


class Setup:
    """q (b, sq, h, d) and caches (b, s, hk, d) of random numbers."""

    def __init__(self, batch: int, length: int, heads: int = 32, heads_k: int = 8, dim: int = 128, queries: int = 1):
        torch.manual_seed(0)
        options = {"device": "cuda", "dtype": torch.bfloat16}
        self.q = torch.randn(batch, queries, heads, dim, **options)
        self.k, self.v = (torch.randn(batch, length, heads_k, dim, **options) for _ in range(2))
        self.lengths = torch.full((batch,), length, device="cuda", dtype=torch.int32)

    def ours(self) -> Step:
        """Our step over the dense cache."""
        return lambda: flash_attn_with_kvcache(self.q, self.k, self.v, cache_seqlens=self.lengths, causal=True)

    def paged(self, size: int) -> Step:
        """Our step over pages in random order; the reference's cache follows their order."""
        pages = self.k.shape[0] * self.k.shape[1] // size
        table = torch.randperm(pages, device="cuda").int().view(self.k.shape[0], -1)
        k, v = (x.view(pages, size, *x.shape[2:]) for x in (self.k, self.v))
        self.k, self.v = (x[table.long()].flatten(1, 2) for x in (k, v))
        return lambda: flash_attn_with_kvcache(self.q, k, v, cache_seqlens=self.lengths, block_table=table, causal=True)

    def narrow(self) -> Step:
        """Our step over a cache in 8 bits."""
        k, v = self.k.to(E4M3), self.v.to(E4M3)
        self.k, self.v = k.bfloat16(), v.bfloat16()
        one = torch.ones((), device="cuda")
        return lambda: attention_with_kvcache(
            self.q, k, v, cache_seqlens=self.lengths, causal=True, k_descale=one, v_descale=one
        )

    def sdpa(self, backend: SDPBackend) -> Step:
        """PyTorch's operator over the dense cache; it has no bottom-right mask, and one query needs none."""
        run = providers.sdpa(backend).dense
        return lambda: run(self.q, self.k, self.v, False)

    def fa3(self) -> Step:
        """FlashAttention-3 as built into vLLM; FA3_SO names its file."""
        torch.ops.load_library(os.environ["FA3_SO"])
        q = self.q.flatten(0, 1)
        starts = torch.arange(self.q.shape[0] + 1, device="cuda", dtype=torch.int32) * self.q.shape[1]
        rest = (None,) * 4
        return lambda: torch.ops._vllm_fa3_C.fwd(
            q, self.k, self.v, None, None, None, None, starts, None, None, None, self.lengths, self.q.shape[1],
            self.k.shape[1], None, None, *rest, None, None, None, self.q.shape[-1] ** -0.5, True, -1, -1, 0.0, True,
            None, 0, None, 0, None, 1, 0, None,
        )[0]  # fmt: skip

    def reading(self) -> Step:
        """A launch that reads the dense cache once."""
        out, block = torch.empty(1, device="cuda"), 8192
        return lambda: _reading_kernel[(self.k.numel() // block,)](self.k, self.v, out, block, num_warps=8)

    def reference(self) -> torch.Tensor:
        """A plain softmax in float32, sequence by sequence."""
        outs = []
        group, queries, length = self.q.shape[2] // self.k.shape[2], self.q.shape[1], self.k.shape[1]
        hidden = torch.ones(queries, length, dtype=torch.bool, device="cuda").triu(length - queries + 1)
        for q, k, v in zip(self.q, self.k, self.v, strict=True):
            k, v = (x.float().transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
            scores = q.float().transpose(0, 1) @ k.transpose(1, 2) * self.q.shape[-1] ** -0.5
            outs.append((scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(0, 1))
        return torch.stack(outs)


def _replayed(step: Step) -> float:
    """Microseconds of one replay of a graph that holds one step."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return do_bench(graph.replay, warmup=15, rep=60, return_mode="median") * 1e3


def _hosted(step: Step) -> float:
    """Microseconds of host time of an eager call, the best of five times 200."""
    for _ in range(50):
        step()
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(200):
            step()
        best = min(best, (time.perf_counter() - start) / 200)
    torch.cuda.synchronize()
    return best * 1e6


def _add(record: Record, case: str, provider: str, setup: Setup, micro: float, item: int = 2) -> None:
    record.add("decode", case, provider, "replay", micro, "us")
    record.add("decode", case, provider, "read", 2 * setup.k.numel() * item / micro * 1e-6, "TB/s")


def _measure(record: Record, case: str, provider: str, setup: Setup, step: Step, item: int = 2) -> None:
    try:
        out = step().reshape(setup.q.shape).float()
        reference = setup.reference()
        if not (out - reference).norm() < 1e-2 * reference.norm():
            print(f"{case}: {provider} is wrong", flush=True)
            return
        micro = _replayed(step)
    except (RuntimeError, TypeError, AttributeError) as error:
        print(f"{case}: {provider} does not serve: {str(error)[:100]}", flush=True)
        return
    _add(record, case, provider, setup, micro, item)


def contexts(record: Record) -> None:
    """Grouped heads, 32 over 8, head dim 128: one token against dense caches, ours beside others."""
    for batch, length in CONTEXTS:
        setup, case = Setup(batch, length), f"{batch} x {length}"
        _measure(record, case, "triton", setup, setup.ours())
        _measure(record, case, "cuDNN (SDPA)", setup, setup.sdpa(SDPBackend.CUDNN_ATTENTION))
        _measure(record, case, "FA2 (SDPA)", setup, setup.sdpa(SDPBackend.FLASH_ATTENTION))
        if "FA3_SO" in os.environ:
            _measure(record, case, "FA3", setup, setup.fa3())
        _add(record, case, "reading alone", setup, _replayed(setup.reading()))


def layouts(record: Record) -> None:
    """Pages, 8 bits, other heads, head dims and numbers of queries."""
    for batch in (16, 64):
        for size in (1, 16, 64, 256):
            setup = Setup(batch, 8192)
            _measure(record, f"{batch} x 8192 pages of {size}", "triton", setup, setup.paged(size))
        setup = Setup(batch, 8192)
        _measure(record, f"{batch} x 8192 float8_e4m3fn", "triton", setup, setup.narrow(), item=1)
    for queries in (1, 2, 4, 8):
        setup = Setup(16, 8192, queries=queries)
        _measure(record, f"16 x 8192 queries {queries}", "triton", setup, setup.ours())
    for heads, heads_k, dim in ((32, 1, 128), (16, 16, 128), (32, 8, 64), (32, 8, 256)):
        setup = Setup(16, 8192, heads, heads_k, dim)
        case = f"16 x 8192 heads {heads}:{heads_k} d{dim}"
        _measure(record, case, "triton", setup, setup.ours())
        _measure(record, case, "cuDNN (SDPA)", setup, setup.sdpa(SDPBackend.CUDNN_ATTENTION))


def host(record: Record) -> None:
    """What Python and dispatch cost, with and without an append."""
    setup = Setup(1, 1024)
    record.add("host", "decode", "triton", "eager", _hosted(setup.ours()), "us")
    k, v = setup.k[:, :1].clone(), setup.v[:, :1].clone()
    lengths = setup.lengths - 1
    step = lambda: flash_attn_with_kvcache(  # noqa: E731
        setup.q, setup.k, setup.v, k, v, cache_seqlens=lengths, causal=True
    )
    record.add("host", "decode with append", "triton", "eager", _hosted(step), "us")
    run = setup.sdpa(SDPBackend.FLASH_ATTENTION)
    record.add("host", "decode", "FA2 (SDPA)", "eager", _hosted(run), "us")


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="nvidia-h200-decode", help="name of the results file")
    parser.add_argument("--out", help="folder of the results file; default benchmarks/results")
    options = parser.parse_args()
    folder = RESULTS if options.out is None else RESULTS.__class__(options.out)
    record = Record(folder / f"{options.name}.json", torch.cuda.get_device_name(), [])
    host(record)
    contexts(record)
    layouts(record)


if __name__ == "__main__":
    main()
