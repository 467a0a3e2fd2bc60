"""Attention as a function of (batch, heads, seqlen, head_dim) tensors, or of sequences of different lengths."""

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor

from flash_attention.padding import Packing, aligned_queries, check_mask
from flash_attention.ragged import Ragged, Sequences, hand_back, is_ragged, lay_out
from flash_attn_plus import InvalidArgument, attention


def window_bounds(window_size: Sequence[int]) -> tuple[int, int]:
    """(left, right) as integers; raises InvalidArgument unless there are two."""
    try:
        left, right = map(int, window_size)
        is_same = (left, right) == tuple(window_size)  # a fraction of a key would be dropped
    except (TypeError, ValueError, OverflowError):
        is_same = False
    if not is_same:
        raise InvalidArgument(f"window_size must be a pair of integers (left, right), not {window_size!r}")
    return left, right


def is_positional(seqlen_q: int, causal: bool, window: tuple[int, int], alibi_slopes: Tensor | None) -> bool:
    """Whether weights depend on positions; a causal mask of one query, the last, hides nothing."""
    return (causal and seqlen_q != 1) or max(window) >= 0 or alibi_slopes is not None


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise InvalidArgument unless the shapes are (b, h, sq, d), (b, hk, sk, d) and (b, hk, sk, dv), h % hk == 0."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.is_nested:
            raise InvalidArgument(f"{name} must be a tensor like q; pass lists or nested tensors for all of q, k and v")
        if x.ndim != 4:
            raise InvalidArgument(f"{name} must have shape (batch, heads, seqlen, head_dim), not {tuple(x.shape)}")
    b, h, _, d = q.shape
    if k.shape[0] != b or k.shape[3] != d or h % max(1, k.shape[1]):
        raise InvalidArgument(
            f"k must have shape (batch, heads_k, seqlen_k, head_dim) with q's batch {b} and head_dim {d} and a divisor"
            f" of its {h} heads, not {tuple(k.shape)}"
        )
    if v.shape[:3] != k.shape[:3]:
        raise InvalidArgument(f"v must have k's batch, heads and length {tuple(k.shape[:3])}, not {tuple(v.shape[:3])}")


def _attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The engine's out and lse."""
    return cast("tuple[Tensor, Tensor]", attention(q, k, v, return_lse=True, **options))


def _dense(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """out and lse of (b, s, h, d) tensors."""
    if keep is None:
        return _attend(q, k, v, **options)
    keys = Packing.of(keep)
    packed = {"cu_seqlens_k": keys.cu_seqlens, "max_seqlen_k": k.shape[1], **options}
    k, v = keys.pack(k), keys.pack(v)
    if not is_positional(q.shape[1], options["causal"], options["window_size"], options["alibi_slopes"]):
        return _attend(q, k, v, **packed)
    queries = keys if q.shape[1] == keep.shape[1] else Packing.of(aligned_queries(keep, q.shape[1]))
    out, lse = _attend(queries.pack(q), k, v, cu_seqlens_q=queries.cu_seqlens, max_seqlen_q=q.shape[1], **packed)
    return queries.unpack(out), queries.unpack(lse.transpose(0, 1), float("inf")).transpose(1, 2)


def _ragged(q: Ragged, k: Ragged, v: Ragged, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """out (total, h, dv) and lse (h, total)."""
    if len(k.cu_seqlens) != len(q.cu_seqlens) or len(v.cu_seqlens) != len(q.cu_seqlens):
        raise InvalidArgument(
            f"q, k and v must hold equally many sequences, not {len(q.cu_seqlens) - 1}, {len(k.cu_seqlens) - 1} and"
            f" {len(v.cu_seqlens) - 1}"
        )
    if v.lengths != k.lengths:
        raise InvalidArgument("v must hold sequences of the same lengths as k; give nested tensors the same offsets")
    return _attend(
        q.rows, k.rows, v.rows, cu_seqlens_q=q.cu_seqlens, cu_seqlens_k=k.cu_seqlens, max_seqlen_q=q.longest,
        max_seqlen_k=k.longest, **options,
    )  # fmt: skip


def flash_attention(
    q: Tensor | Sequences,
    k: Tensor | Sequences,
    v: Tensor | Sequences,
    key_padding_mask: Tensor | None = None,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Any:
    """softmax(softmax_scale q k^T) v without the matrix of scores, in memory linear in the sequence length.

    Args:
        q: (b, h, sq, d) of any strides; float16, bfloat16, float32 (in full accuracy) or float64. Or b sequences of
            different lengths: a list of (h, sq_i, d), or a nested tensor (b, h, *, d) of layout torch.jagged, such as
            the transpose(1, 2) of a (b, *, h, d); no padding is computed then.
        k: (b, hk, sk, d), or sequences like q's; h must be a multiple of hk. Lengths may differ from q's.
        v: (b, hk, sk, dv), or sequences of k's lengths.
        key_padding_mask: bool (b, sk): True where a token takes part and False where it is padding, as in flash-attn's
            and Hugging Face's masks and in scaled_dot_product_attention (only torch.nn.MultiheadAttention means the
            opposite: pass ~mask). Any pattern is served, and the mask is never read on the host. The result is that of
            the sequences with their padding removed. With `causal`, `window_size` or `alibi_slopes` positions therefore
            count the tokens that take part; query i stands at key i + sk - sq, and where that key is padding the query
            is too, and gets out 0.
        causal: query i sees keys up to i + sk - sq: the last query sees all.
        softmax_scale: default d ** -0.5.
        dropout_p: probability to drop an attention weight, in [0, 1); applied whenever positive.
        window_size: (left, right) keys visible beside the diagonal, inclusive; -1 is unbounded.
        softcap: when positive, scores become softcap * tanh(score / softcap).
        alibi_slopes: float32 (h,) or (b, h); adds -slope * |distance| to the scores.
        deterministic: make dq bitwise repeatable too.
        return_lse: also return the natural log-sum-exp of the scores, which is differentiable.

    Returns:
        out (b, h, sq, dv), or a list or nested tensor like q; with return_lse also lse, float32 (float64 for float64
        inputs) without the last dimension. A query that sees no key has out 0 and lse +inf.

    Raises:
        InvalidArgument: a shape, dtype, device or option breaks the contract; the message names it.
    """
    options = {
        "causal": causal, "softmax_scale": softmax_scale, "dropout_p": dropout_p,
        "window_size": window_bounds(window_size),
        "softcap": softcap, "alibi_slopes": alibi_slopes, "deterministic": deterministic,
    }  # fmt: skip
    if is_ragged(q):
        if key_padding_mask is not None:
            raise InvalidArgument("key_padding_mask is for dense tensors; lists and nested tensors hold no padding")
        if not (is_ragged(k) and is_ragged(v)):
            raise InvalidArgument("k and v must be lists or nested tensors like q")
        out, lse = _ragged(lay_out("q", q, 1, 3), lay_out("k", k, 1, 3), lay_out("v", v, 1, 3), options)
        out = hand_back(out, q, 1)
        return (out, hand_back(lse.transpose(0, 1), q, 1)) if return_lse else out
    check_tensors(q, k, v)
    if key_padding_mask is not None:
        check_mask(key_padding_mask, (k.shape[0], k.shape[2]), k.device)
    out, lse = _dense(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), key_padding_mask, options)
    return (out.transpose(1, 2), lse) if return_lse else out.transpose(1, 2)
