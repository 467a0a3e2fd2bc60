"""What (batch, heads, seqlen, head_dim) attention should give, one sequence after the other, padding left out."""

from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn_plus.reference import attention_reference
from flash_attn_plus.testing import assert_close

OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 2)},
    "causal_window": {"causal": True, "window_size": (4, -1)},
    "softcap": {"softcap": 2.0, "softmax_scale": 0.7},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
    "alibi_batch_causal": {
        "causal": True,
        "alibi_slopes": torch.rand(3, 4, generator=torch.Generator().manual_seed(2)),
    },
}


class Sample(NamedTuple):
    """Leaves q, k, v, each sequence's own in a list or together in a tensor, and what arrives at out and lse."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor


def make(sq: int, sk: int, dtype: torch.dtype, device: str, batch: int = 3, heads_k: int = 2, dv: int = 16) -> Sample:
    """Seeded inputs with 4 query heads of 24 features."""
    random = torch.Generator().manual_seed(sq + 31 * sk)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(device, dtype)

    made = normal(batch, 4, sq, 24), normal(batch, heads_k, sk, 24), normal(batch, heads_k, sk, dv)
    dout, dlse = normal(batch, 4, sq, dv), normal(batch, 4, sq).float()
    return Sample(*(x.requires_grad_() for x in made), dout, dlse)


def one_sequence(q: Tensor, k: Tensor, v: Tensor, n: int, is_exact: bool, **options) -> tuple[Tensor, Tensor]:
    """out (h, sq, dv) and lse (h, sq) of q (h, sq, d), k and v: in float64, or in plain PyTorch in their dtype."""
    left, right = options.pop("window_size", (-1, -1))
    slopes = options.pop("alibi_slopes", None)
    out, lse = attention_reference(
        *(x.transpose(0, 1)[None] for x in (q, k, v)),
        left=left,
        right=0 if options.pop("causal", False) else right,
        alibi_slopes=slopes[n].to(q.device) if slopes is not None and slopes.ndim == 2 else slopes,
        dtype=torch.float64 if is_exact else q.dtype,
        is_two_pass=not is_exact,
        **options,
    )
    return out[0].transpose(0, 1), lse[0]


def without_padding(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, is_exact: bool, **options) -> tuple[Tensor, Tensor]:
    """out and lse (b, h, sq, ...) by the documented rule, sequence by sequence on the host."""
    is_positional = bool(options.keys() & {"causal", "window_size", "alibi_slopes"})
    sq, sk = q.shape[2], k.shape[2]
    outs, lses = [], []
    for n in range(len(q)):
        keys = [j for j in range(sk) if keep[n, j]]
        queries = [i for i in range(sq) if not is_positional or i + sk - sq < 0 or keep[n, i + sk - sq]]
        out, lse = one_sequence(q[n, :, queries], k[n, :, keys], v[n, :, keys], n, is_exact, **options)
        index = torch.tensor(queries, dtype=torch.int64, device=q.device)
        outs.append(out.new_zeros(len(out), sq, out.shape[-1]).index_copy(1, index, out))
        lses.append(lse.new_full((len(lse), sq), float("inf")).index_copy(1, index, lse))
    return torch.stack(outs), torch.stack(lses)


def gradients(sample: Sample, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """dq, dk and dv of out and lse, rows without keys of which receive nothing."""
    lse = lse.where(lse.isfinite(), 0.0)
    return torch.autograd.grad((out, lse), sample[:3], (sample.dout.to(out.dtype), sample.dlse.to(lse.dtype)))


def assert_right(actual, sample: Sample, function) -> None:
    """Hold (out, lse) and their gradients to the one tolerance; `function(is_exact)` is the oracle."""
    exact, eager = function(True), function(False)
    names = ("out", "lse", "dq", "dk", "dv")
    results = [(*(x.detach() for x in pair), *gradients(sample, *pair)) for pair in (actual, exact, eager)]
    for name, x, reference, plain in zip(names, *results, strict=True):
        assert_close(name, x, reference.double(), plain)
