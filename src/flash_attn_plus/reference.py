"""The oracle: attention written out naively in plain PyTorch, differentiable by autograd.

In float64 it is the truth that results are measured against; in the inputs' dtype, and with its gradients from the
two-pass formula, it is the plain PyTorch whose error sets the scale of what is allowed.
It takes memory quadratic in the sequence length.
"""

import math

import torch
from torch import Tensor

from flash_attn_plus.dropout import keep_mask


def _starts(cu_seqlens: Tensor | None, batch: int) -> list[int]:
    return [0] * (batch + 1) if cu_seqlens is None else cu_seqlens.tolist()


def _keys_of(
    x: Tensor, n: int, start: int, length: int, is_packed: bool, block_table: Tensor | None
) -> Tensor:  # (length, hk, d)
    if block_table is not None:
        page_size = x.shape[1]
        pages = block_table[n, : math.ceil(length / page_size)].long()
        return x[pages].flatten(0, 1)[:length]
    return (x if is_packed else x[n])[start : start + length]


def visible(len_q: int, len_k: int, left: int, right: int, device: torch.device) -> Tensor:
    """Bool (len_q, len_k): the keys inside the band around the bottom-right-aligned diagonal."""
    distance = (
        torch.arange(len_k, device=device) - torch.arange(len_q, device=device)[:, None] - (len_k - len_q)
    )  # of key j from the key aligned with query i
    inside = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        inside &= distance >= -left
    if right >= 0:
        inside &= distance <= right
    return inside


def _kept(n: int, heads: int, len_q: int, len_k: int, rng_state: Tensor | None, dropout_p: float) -> Tensor | None:
    """Bool (heads, len_q, len_k) of sequence n, or None without dropout."""
    if dropout_p == 0.0:
        return None
    indices = n * heads + torch.arange(heads, device=rng_state.device)
    return keep_mask(rng_state, indices, range(len_q), range(len_k), dropout_p)


def shown_by_blocks(block_mask: Tensor, block_size: tuple[int, int], len_q: int, len_k: int) -> Tensor:
    """Bool (..., len_q, len_k) from bool (..., query blocks, key blocks): every score of a block is alike."""
    rows = block_mask.repeat_interleave(block_size[0], -2)[..., :len_q, :]
    return rows.repeat_interleave(block_size[1], -1)[..., :len_k]


class TwoPass(torch.autograd.Function):
    """softmax(scores) @ v whose gradient is the formula of every FlashAttention, from the stored out and LSE.

    weights = exp(again - lse), delta = rowsum(dout * out) - dlse, dscores = weights * (dout v^T - delta), where `again`
    are the scores computed anew. Every product is in the dtype of scores; LSE and delta are float32 (float64 for
    float64), as the contract stores them. `factor` (0 or 1 / (1 - p), or None) multiplies the weights.
    """

    @staticmethod
    def forward(ctx, scores: Tensor, again: Tensor, v: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
        statistics = torch.float64 if scores.dtype == torch.float64 else torch.float32
        lse = scores.to(statistics).logsumexp(-1)
        weights = scores.softmax(-1)
        out = (weights if factor is None else weights * factor) @ v
        ctx.save_for_backward(again, v, factor, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout: Tensor, dlse: Tensor) -> tuple[Tensor, None, Tensor, None]:
        again, v, factor, out, lse = ctx.saved_tensors
        weights = (again.to(lse.dtype) - lse[..., None]).exp().to(v.dtype)
        dweights = dout @ v.transpose(-1, -2)
        kept = weights
        if factor is not None:
            dweights, kept = dweights * factor, weights * factor
        delta = (dout.to(lse.dtype) * out).sum(-1, keepdim=True) - dlse[..., None]
        return (weights * (dweights - delta)).to(v.dtype), None, kept.transpose(-1, -2) @ dout, None


def sequence_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    left: int,
    right: int,
    softcap: float,
    slopes: Tensor | None,
    keep: Tensor | None,
    shown: Tensor | None,
    dropout_p: float,
    is_two_pass: bool,
) -> tuple[Tensor, Tensor]:
    """Attention of one sequence in the dtype of its inputs.

    q is (h, sq, d), k (h, sk, d), v (h, sk, dv), slopes (h,), keep and shown bool (h, sq, sk);
    returns out (h, sq, dv) and lse (h, sq).
    """
    len_q, len_k = q.shape[1], k.shape[1]
    if len_k == 0:  # zeros and infinities that autograd still traces to the inputs
        lse = (q * 0.0).sum(-1) + float("inf")
        return q @ k.transpose(1, 2) @ v, lse.float() if is_two_pass and q.dtype != torch.float64 else lse
    inside = visible(len_q, len_k, left, right, q.device)
    inside = inside if shown is None else inside & shown
    has_key = inside.any(-1)

    def score(q: Tensor, k: Tensor) -> Tensor:
        scores = q @ k.transpose(1, 2) * softmax_scale
        if softcap > 0.0:
            scores = softcap * torch.tanh(scores / softcap)
        if slopes is not None:
            rows = torch.arange(len_q, device=q.device)[:, None] + len_k - len_q
            distance = (rows - torch.arange(len_k, device=q.device)).abs()
            scores = scores - (slopes.double()[:, None, None] * distance).to(q.dtype)
        return scores.masked_fill(~inside, float("-inf")).masked_fill(~has_key[..., None], 0.0)

    scores = score(q, k)
    factor = None if keep is None else keep.to(q.dtype) / (1.0 - dropout_p)
    if is_two_pass:
        # The second pass sums in another order than the first, as kernels with other tiles do.
        again = score(q.detach().flip(-1), k.detach().flip(-1))
        out, lse = TwoPass.apply(scores, again, v, factor)
    else:
        weights = scores.softmax(-1)
        out, lse = (weights if factor is None else weights * factor) @ v, scores.logsumexp(-1)
    return out.masked_fill(~has_key[..., None], 0.0), lse.masked_fill(~has_key, float("inf"))


def _descaled(x: Tensor, descale: Tensor | None, n: int) -> Tensor:
    """(s, hk, d) of sequence n times its factor."""
    if descale is None:
        return x
    factor = descale[n] if descale.ndim == 2 else descale
    return x * factor.to(x.dtype).reshape(-1, 1)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    left: int = -1,
    right: int = -1,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    block_table: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    rng_state: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    block_mask: Tensor | None = None,
    block_size: tuple[int, int] = (0, 0),
    dtype: torch.dtype = torch.float64,
    is_two_pass: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention as the documentation defines it, every step in `dtype`.

    Args:
        q, k, v: as for `AttentionInputs`: dense (b, s, h, d), packed (total, h, d) with cu_seqlens, or paged keys.
        left, right: visible keys beside the diagonal; -1 is unbounded; causal is right = 0.
        rng_state: int64 (2,), seed and offset of the dropout bits; needed when dropout_p > 0.
        k_descale, v_descale: (), (hk,) or (b, hk), what the keys and values of 8-bit caches are multiplied with.
        block_mask: bool (1 or b, 1 or h, query blocks, key blocks): which blocks of block_size scores are visible.
        dtype: float64 for the oracle, the inputs' dtype for plain PyTorch in the same precision.
        is_two_pass: take gradients by the formula of `TwoPass` instead of autograd's.
        The other arguments are those of `attention`.

    Returns:
        out in `dtype`, (b, sq, h, dv) or (total_q, h, dv), and lse, (b, h, sq) or (h, total_q), in `dtype` (if
        is_two_pass, in float32 at least).
        A row without keys, and a packed row that belongs to no sequence, has out 0, lse +inf and no gradient.
    """
    heads, batch = q.shape[-2], q.shape[0] if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    group = heads // k.shape[-2]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    is_packed_k = cu_seqlens_k is not None and block_table is None
    starts_q, starts_k = _starts(cu_seqlens_q, batch), _starts(cu_seqlens_k, batch)
    outs, lses = [], []
    for n in range(batch):
        q_n = q[n] if cu_seqlens_q is None else q[starts_q[n] : starts_q[n + 1]]
        length = starts_k[n + 1] - starts_k[n] if cu_seqlens_k is not None else k.shape[1]
        length = int(seqused_k[n]) if seqused_k is not None else length
        skipped = int(leftpad_k[n]) if leftpad_k is not None else 0
        start = (starts_k[n] if is_packed_k else 0) + skipped
        k_n, v_n = (_keys_of(x, n, start, max(length - skipped, 0), is_packed_k, block_table) for x in (k, v))
        shown = None
        if block_mask is not None:
            shown = shown_by_blocks(block_mask[n % len(block_mask)], block_size, len(q_n), len(k_n))
        keys, values = (
            _descaled(x.to(dtype), factor, n).transpose(0, 1).repeat_interleave(group, 0)
            for x, factor in ((k_n, k_descale), (v_n, v_descale))
        )
        slopes = alibi_slopes[n] if alibi_slopes is not None and alibi_slopes.ndim == 2 else alibi_slopes
        out, lse = sequence_reference(
            q_n.to(dtype).transpose(0, 1), keys, values, softmax_scale=scale, left=left, right=right, softcap=softcap,
            slopes=slopes, keep=_kept(n, heads, len(q_n), len(k_n), rng_state, dropout_p), shown=shown,
            dropout_p=dropout_p, is_two_pass=is_two_pass,
        )  # fmt: skip
        outs.append(out.transpose(0, 1))
        lses.append(lse)
    if cu_seqlens_q is None:
        return torch.stack(outs), torch.stack(lses)
    rest = q.shape[0] - starts_q[-1]
    outs.append(q.new_zeros((rest, heads, v.shape[-1]), dtype=dtype))
    lses.append(q.new_full((heads, rest), float("inf"), dtype=lses[0].dtype))
    return torch.cat(outs), torch.cat(lses, 1)
