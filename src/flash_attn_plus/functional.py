"""The engine's public call: exact attention of (batch, seqlen, heads, head_dim) or packed (total, heads, head_dim)."""

import torch
from torch import Tensor

from flash_attn_plus import ops
from flash_attn_plus.arguments import as_length, as_number, autocast_dtype, resolve_scale, window_bounds
from flash_attn_plus.autograd import Attention, dropout_state
from flash_attn_plus.checks import check_arguments
from flash_attn_plus.dispatch import apply
from flash_attn_plus.errors import InvalidArgument
from flash_attn_plus.problem import AttentionProblem, describe
from flash_attn_plus.selection import Explanation, explain_problem


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of the active autocast region; unchanged outside one."""
    try:
        if tensors[0].is_cuda and not torch.is_autocast_enabled("cuda"):
            return tensors  # before a device is asked for its type's name, which takes time
        dtype = autocast_dtype(tensors[0].device)
    except AttributeError:
        raise InvalidArgument(
            f"q, k and v must be tensors, not {', '.join(type(x).__name__ for x in tensors)}"
        ) from None
    if dtype is None:
        return tensors
    return tuple(x.to(dtype) if x.dtype in (torch.float32, torch.float16, torch.bfloat16) else x for x in tensors)


def separate(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under torch.compile views, else the tensors: its tracer refuses an autograd function that takes one twice."""
    return tuple(x.view_as(x) for x in tensors) if torch.compiler.is_compiling() else tensors


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    alibi_slopes: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    block_table: Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention in memory linear in the sequence length (Dao et al., arXiv 2205.14135 and 2307.08691).

    Args:
        q: (b, sq, h, d), or packed (total_q, h, d) with `cu_seqlens_q`; float16, bfloat16, float32 or float64.
        k: (b, sk, hk, d), packed (total_k, hk, d), or paged (pages, page_size, hk, d) with `block_table`; h % hk == 0.
        v: like k, with a head dim of its own.
        causal: query i sees keys up to i + sk - sq (bottom-right alignment).
        window_size: (left, right) keys visible beside the diagonal, inclusive; -1 is unbounded.
        softmax_scale: factor on q k^T; default d ** -0.5.
        softcap: when positive, scores become softcap * tanh(score / softcap).
        dropout_p: probability to drop an attention weight, in [0, 1).
        alibi_slopes: float32 (h,) or (b, h); adds -slope * |i + sk - sq - j| to the scores.
        cu_seqlens_q, cu_seqlens_k: int32 (b + 1,), starts of the packed sequences, and the total.
        max_seqlen_q, max_seqlen_k: longest sequence of the batch, required with cu_seqlens.
        seqused_k, leftpad_k: int32 (b,), keys used of each sequence, and leading keys to skip; forward only.
        block_table: int32 (b, max_blocks), pages of each sequence; forward only.
        deterministic: make the gradients bitwise repeatable (by our kernels dk and dv always are).
        return_lse: also return the natural log-sum-exp of the scores, which is differentiable.

    Returns:
        out (b, sq, h, dv) or (total_q, h, dv); with return_lse also lse, float32 (b, h, sq) or (h, total_q).
        A row that sees no key has out 0 and lse +inf.

    Raises:
        InvalidArgument: a shape, dtype, device or option breaks the contract; the message names it.
        NoBackend: no permitted backend serves the call; the message lists all reasons.
    """
    q, k, v = autocast(q, k, v)
    softmax_scale = resolve_scale(softmax_scale, q)
    dropout_p, softcap = as_number("dropout_p", dropout_p), as_number("softcap", softcap)
    left, right = window_bounds(window_size, causal)
    max_seqlen_q = as_length("max_seqlen_q", max_seqlen_q, cu_seqlens_q)
    max_seqlen_k = as_length("max_seqlen_k", max_seqlen_k, cu_seqlens_k)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        if seqused_k is not None or leftpad_k is not None or block_table is not None:
            raise InvalidArgument("block_table, seqused_k and leftpad_k have no backward; call under torch.no_grad()")
        sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        options = (alibi_slopes, dropout_p, softmax_scale, softcap)
        if k is q or v is q or v is k:
            k, v = separate(k, v)
        out, lse = apply(Attention, q, k, v, sequences, options, left, right, deterministic)
    else:
        out, lse = ops.forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, leftpad_k, block_table,
            alibi_slopes, dropout_state(q, dropout_p), dropout_p, softmax_scale, left, right, softcap,
        )  # fmt: skip
    return (out, lse) if return_lse else out


def explain(
    q: Tensor | AttentionProblem,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    backward: bool = False,
    **options,
) -> Explanation:
    """Every backend with its reasons for a call with these arguments (those of `attention`), or for a problem.

    Nothing is computed. `backward=True` asks about the backward pass of the call.
    """
    if isinstance(q, AttentionProblem):
        return explain_problem(q)
    softcap, dropout_p = (as_number(name, options.pop(name, 0.0)) for name in ("softcap", "dropout_p"))
    max_seqlen_q, max_seqlen_k = (
        as_length(f"max_seqlen_{s}", options.pop(f"max_seqlen_{s}", None), options.get(f"cu_seqlens_{s}")) for s in "qk"
    )
    is_deterministic = options.pop("deterministic", False)
    options.pop("return_lse", None)
    scale = options.pop("softmax_scale", None)
    q, k, v = autocast(q, k, v)
    inputs = ops.AttentionInputs(q, k, v, resolve_scale(scale, q), softcap, dropout_p, **options)
    check_arguments(inputs)
    left, right = window_bounds(window_size, causal)
    return explain_problem(describe(inputs, max_seqlen_q, max_seqlen_k, left, right, backward, is_deterministic))
