"""What attention holds in memory as sequences grow, beside standard attention, and what the formula foretells.

python examples/memory_report.py
"""

import torch
from torch import Tensor

from flash_attn_plus import attention

BATCH, HEADS, HEADS_K, HEAD_DIM = 1, 8, 2, 64


def standard(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The textbook's: every score of every head lies in memory."""
    k, v = (x.repeat_interleave(HEADS // HEADS_K, dim=2) for x in (k, v))
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def foretold(seqlen: int, element: int) -> int:
    """Bytes that training keeps of one call: q, k, v and out, and 4 for the log-sum-exp of each row of each head."""
    return BATCH * seqlen * ((2 * HEADS + 2 * HEADS_K) * HEAD_DIM * element + 4 * HEADS)


def kept_bytes(function, tensors: list[Tensor]) -> tuple[int, Tensor]:
    """Bytes that the call keeps for its backward pass, each piece of memory counted once; and its output."""
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = function(*tensors)
    return sum(kept.values()), out


def peak_bytes(function, tensors: list[Tensor]) -> int | None:
    """Bytes that forward and backward hold at their peak beyond the inputs, where the allocator tells."""
    if tensors[0].device.type != "cuda":
        return None
    torch.autograd.grad(function(*tensors).sum(), tensors)  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(function(*tensors).sum(), tensors)
    return torch.cuda.max_memory_allocated() - before


def main() -> None:
    """One line for each length."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    print(f"{HEADS} query heads on {HEADS_K} key heads of {HEAD_DIM}, {dtype}, on {device}; megabytes kept")
    print(f"{'seqlen':>8}{'foretold':>10}{'measured':>10}{'standard':>10}{'peak':>10}")
    for seqlen in (256, 512, 1024, 2048):
        tensors = [
            torch.randn(BATCH, seqlen, heads, HEAD_DIM, device=device, dtype=dtype, requires_grad=True)
            for heads in (HEADS, HEADS_K, HEADS_K)
        ]
        ours, out = kept_bytes(attention, tensors)
        theirs, expected = kept_bytes(standard, tensors)
        torch.testing.assert_close(out, expected, rtol=0.02, atol=0.01)
        assert ours == foretold(seqlen, out.element_size()), "the call keeps something else"
        peak = peak_bytes(attention, tensors)
        cells = [foretold(seqlen, out.element_size()), ours, theirs, peak]
        print(f"{seqlen:>8}", *(f"{'-' if n is None else f'{n / 1e6:,.2f}':>10}" for n in cells), sep="")


if __name__ == "__main__":
    main()
