"""S_dmask: the attention weights and dropout bits that `return_attn_probs=True` hands out.

Entry (i, j) is exp(s_ij - M), where M is the largest score of row i over the visible keys from the start of j's key
block on: the running maximum of a kernel that walks the key blocks from last to first. The sign bit says "dropped".
"""

import torch
from torch import Tensor

from flash_attn_plus.dropout import keep_mask

TILE = 128  # query rows at a time, so that only the result is quadratic


def _get_block_size_n(device, head_dim, is_dropout, is_causal):
    """Width of the key blocks over which S_dmask is scaled; the original's table."""
    assert head_dim <= 256
    if head_dim <= 32:
        return 128
    if head_dim <= 64:
        return 64 if is_dropout else 128
    if head_dim <= 96 or head_dim > 128:
        return 64
    is_consumer_ampere_or_ada = torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device) in (
        (8, 6),
        (8, 9),
    )
    if is_consumer_ampere_or_ada:
        return 64 if not is_dropout and is_causal else 32
    return 32 if is_dropout else 64


def round_multiple(x, m):
    """x rounded up to a multiple of m."""
    return (x + m - 1) // m * m


def _padded(x: Tensor, starts: Tensor, length: int) -> Tensor:
    """(b, length, heads, d) from packed (total, heads, d); what lies beyond a sequence is arbitrary."""
    rows = starts[:, None] + torch.arange(length, device=x.device)
    return x[rows.clamp_(max=max(x.shape[0] - 1, 0))]


def _padded_keys(k, cu_seqlens_k, max_seqlen_k, seqused_k, leftpad_k, block_table, batch):
    """Keys (b, max_seqlen_k, hk, d), each sequence's valid ones first, and their counts (b,)."""
    if block_table is not None:
        lengths = seqused_k if seqused_k is not None else cu_seqlens_k.diff()
        positions = torch.arange(max_seqlen_k, device=k.device)
        pages = block_table.index_select(1, (positions // k.shape[1]).clamp_(max=block_table.shape[1] - 1))
        return k[pages.clamp(0, k.shape[0] - 1), positions % k.shape[1]], lengths
    if cu_seqlens_k is None:
        return k, torch.full((batch,), max_seqlen_k, dtype=torch.int32, device=k.device)
    lengths = seqused_k if seqused_k is not None else cu_seqlens_k.diff()
    starts = cu_seqlens_k[:-1]
    if leftpad_k is not None:
        starts, lengths = starts + leftpad_k, lengths - leftpad_k
    return _padded(k, starts, max_seqlen_k), lengths


def _visible(rows, cols, len_q, len_k, left, right):
    """bool (b, 1, rows, cols): both lie in their sequence, and the key inside the query's band."""
    len_q, len_k = len_q[:, None, None, None], len_k[:, None, None, None]
    distance = cols - rows[:, None] - (len_k - len_q)
    inside = (rows[:, None] < len_q) & (cols < len_k)
    if left >= 0:
        inside = inside & (distance >= -left)
    if right >= 0:
        inside = inside & (distance <= right)
    return inside, distance


def _scaled_weights(scores: Tensor, width: int) -> Tensor:
    """exp(score - running maximum from the right over blocks of `width` keys); 0 where the score is -inf."""
    length = scores.shape[-1]
    blocks = torch.nn.functional.pad(scores, (0, -length % width), value=float("-inf")).unflatten(-1, (-1, width))
    running = blocks.amax(-1).flip(-1).cummax(-1).values.flip(-1)
    running = running.masked_fill(running == float("-inf"), 0.0)  # no key seen yet: avoid inf - inf
    return (blocks - running[..., None]).exp_().flatten(-2)[..., :length]


def _allocate(q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, max_seqlen_q: int, max_seqlen_k: int) -> Tensor:
    if cu_seqlens_q is None:
        batch, max_seqlen_q, max_seqlen_k = q.shape[0], q.shape[1], k.shape[1]
    else:
        batch = cu_seqlens_q.shape[0] - 1
    return q.new_empty((batch, q.shape[-2], round_multiple(max_seqlen_q, 128), round_multiple(max_seqlen_k, 128)))


@torch.library.custom_op("flash_attn::_softmax_dump", mutates_args=())
def softmax_dump(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    rng_state: Tensor,
    dropout_p: float,
    softmax_scale: float,
    window_size_left: int,
    window_size_right: int,
) -> Tensor:
    """S_dmask, like q, (b, h, max_seqlen_q and max_seqlen_k rounded up to 128), 0 at masked and padded entries.

    The arguments are those of `flash_attn_plus.ops.forward`; dense calls take the lengths from q and k.
    """
    out = _allocate(q, k, cu_seqlens_q, max_seqlen_q, max_seqlen_k).zero_()
    if q.numel() == 0 or k.numel() == 0:
        return out
    if cu_seqlens_q is None:
        max_seqlen_q, max_seqlen_k = q.shape[1], k.shape[1]
        len_q = torch.full((q.shape[0],), max_seqlen_q, dtype=torch.int32, device=q.device)
    else:
        len_q, q = cu_seqlens_q.diff(), _padded(q, cu_seqlens_q[:-1], max_seqlen_q)
    batch, heads, head_dim = q.shape[0], q.shape[2], q.shape[3]
    k, len_k = _padded_keys(k, cu_seqlens_k, max_seqlen_k, seqused_k, leftpad_k, block_table, batch)
    if max_seqlen_k == 0:
        return out
    group = heads // k.shape[2]
    precise = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys = k.to(precise).permute(0, 2, 3, 1).unsqueeze(2)  # (b, hk, 1, d, sk)
    batch_heads = torch.arange(batch * heads, device=q.device).view(batch, heads)
    width = _get_block_size_n(q.device, min(head_dim, 256), True, window_size_right == 0)
    smallest = 2.0**-24 if q.dtype == torch.float16 else torch.finfo(q.dtype).smallest_normal
    cols = torch.arange(max_seqlen_k, device=q.device)
    for start in range(0, max_seqlen_q, TILE):
        stop = min(start + TILE, max_seqlen_q)
        rows = torch.arange(start, stop, device=q.device)
        queries = q[:, start:stop].to(precise).transpose(1, 2).unflatten(1, (-1, group))  # (b, hk, group, rows, d)
        scores = (queries @ keys).flatten(1, 2) * softmax_scale
        inside, distance = _visible(rows, cols, len_q, len_k, window_size_left, window_size_right)
        if alibi_slopes is not None:
            scores -= alibi_slopes.to(precise).expand(batch, heads)[..., None, None] * distance.abs()
        weights = _scaled_weights(scores.masked_fill_(~inside, float("-inf")), width)
        is_kept = keep_mask(rng_state, batch_heads, range(start, stop), range(max_seqlen_k), dropout_p)
        # A dropped weight that rounds to zero keeps its sign, which readers test with `>= 0`.
        weights = torch.where(is_kept | ~inside, weights, -weights.clamp_min(smallest))
        out[:, :, start:stop, :max_seqlen_k] = weights
    return out


@softmax_dump.register_fake
def _softmax_dump_fake(
    q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, leftpad_k, block_table, alibi_slopes,
    rng_state, dropout_p, softmax_scale, window_size_left, window_size_right,
):  # fmt: skip
    return _allocate(q, k, cu_seqlens_q, max_seqlen_q, max_seqlen_k)
