"""How long a function takes, and what the machine gives at best: products of matrices and copies."""

from collections.abc import Callable
from typing import NamedTuple

import torch

_SMALL_MATRIX, _LARGE_MATRIX = 1024, 8192
_TRIES = 3  # of which the fastest counts: it is a bound
_SMALL_COPY, _LARGE_COPY = 1 << 26, 1 << 30  # bytes; beyond every cache


class Roofline(NamedTuple):
    """Rates of one device, measured in the same run as what is compared with them."""

    tflops: float
    gbps: float

    def milliseconds(self, flops: float, moved: float) -> float:
        """The least time for that many operations and bytes."""
        return max(flops / self.tflops * 1e-9, moved / self.gbps * 1e-6)


def milliseconds(function: Callable[[], object], where: torch.device, seconds: float = 0.1) -> float:
    """The median time of a call, over about that many seconds, with cold caches on an accelerator."""
    if where.type != "cpu":
        from triton.testing import do_bench

        return do_bench(function, warmup=seconds * 250, rep=seconds * 1000, return_mode="median")
    from torch.utils.benchmark import Timer  # which imports much, and warns where CUDA's compiler is but no GPU

    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).median * 1e3


def roofline(where: torch.device, dtype: torch.dtype) -> Roofline:
    """Measure a product of square matrices in a dtype and a copy, both large for the device."""
    is_large = where.type != "cpu"
    n, size = (_LARGE_MATRIX, _LARGE_COPY) if is_large else (_SMALL_MATRIX, _SMALL_COPY)
    a, b = (torch.randn(n, n, device=where, dtype=dtype) for _ in range(2))
    product = min(milliseconds(lambda: a @ b, where) for _ in range(_TRIES))
    source = torch.empty(size, dtype=torch.uint8, device=where).fill_(1)
    target = torch.empty_like(source)
    copy = min(milliseconds(lambda: target.copy_(source), where) for _ in range(_TRIES))
    return Roofline(2 * n**3 / product * 1e-9, 2 * size / copy * 1e-6)
