"""Peak memory of one attention call, forward and backward, measured on the allocator of the device."""

from collections.abc import Callable

import torch
from torch.autograd.profiler import profile

from demo.attention import Attention

Peaks = dict[int, int | None]  # sequence length -> bytes, None where the device's memory did not suffice


def _peak_on_cpu(run: Callable[[], None]) -> int:
    """Highest sum of live bytes over the allocator's own record of every allocation and release, inside ops too."""
    with profile(profile_memory=True) as recorded:
        run()
    events = [(e.start_ns(), e.nbytes()) for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for _, nbytes in sorted(events, key=lambda event: event[0]):
        live += nbytes
        peak = max(peak, live)
    return peak


def _peak_on_gpu(run: Callable[[], None], memory) -> int:
    run()  # compiles, and makes every workspace that stays
    memory.reset_peak_memory_stats()
    before = memory.memory_allocated()
    run()
    return memory.max_memory_allocated() - before


def attention_peak(
    attention: Attention, device: torch.device, dtype: torch.dtype, seqlen: int, heads: int, head_dim: int
) -> int | None:
    """Bytes that one forward and backward pass over one sequence holds at its peak, beyond q, k, v and dout."""
    q, k, v, dout = (torch.randn(1, seqlen, heads, head_dim, device=device, dtype=dtype) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def run() -> None:
        torch.autograd.grad(attention(*leaves), leaves, dout)

    if device.type == "cpu":
        return _peak_on_cpu(run)
    try:
        return _peak_on_gpu(run, getattr(torch, device.type))
    except torch.OutOfMemoryError:
        return None


def can_measure(device: torch.device) -> bool:
    """Whether the allocator of the device tells its peak."""
    return device.type == "cpu" or hasattr(getattr(torch, device.type), "max_memory_allocated")
