"""The private operators of the interface, `torch.ops.flash_attn.*`: unpadded head dims, split window arguments.

They carry no autograd formula. Each body is made of operators that have fakes of their own, so it is its own fake.
The tag keeps compilers from running a call with dropout twice and expecting the same bits.
"""

import torch
from torch import Tensor

from flash_attn import _raw

_RANDOM = (torch.Tag.nondeterministic_seeded,)


def maybe_contiguous(x):
    """x itself when it is None or its last stride is 1, else a contiguous copy; checks refuse what is no tensor."""
    return x.contiguous() if isinstance(x, Tensor) and x.stride(-1) != 1 else x


@torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=(), tags=_RANDOM)
def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, S_dmask, rng_state) of q (b, sq, h, d) and k, v (b, sk, hk, d)."""
    q, k, v = (maybe_contiguous(x) for x in (q, k, v))
    return _raw.fwd(
        q, k, v, None, alibi_slopes, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
        return_softmax, None,
    )  # fmt: skip


@torch.library.custom_op("flash_attn::_flash_attn_varlen_forward", mutates_args=(), tags=_RANDOM)
def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, S_dmask, rng_state) of q (total_q, h, d) and k, v packed (total_k, hk, d) or paged."""
    q, k, v = (maybe_contiguous(x) for x in (q, k, v))
    return _raw.varlen_fwd(
        q, k, v, None, cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table, alibi_slopes, max_seqlen_q,
        max_seqlen_k, dropout_p, softmax_scale, zero_tensors, causal, window_size_left, window_size_right, softcap,
        return_softmax, None, num_splits,
    )  # fmt: skip


@torch.library.custom_op("flash_attn::_flash_attn_backward", mutates_args=("dq", "dk", "dv"))
def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Writes dq, dk and dv; returns softmax_d, float32 (b, h, sq rounded up to 128)."""
    dout, q, k, v, out = (maybe_contiguous(x) for x in (dout, q, k, v, out))
    return _raw.bwd(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, alibi_slopes, dropout_p, softmax_scale, causal,
        window_size_left, window_size_right, softcap, deterministic, None, rng_state,
    )[3]  # fmt: skip


@torch.library.custom_op("flash_attn::_flash_attn_varlen_backward", mutates_args=("dq", "dk", "dv"))
def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """Writes dq, dk and dv; returns softmax_d, float32 (h, total_q + 128 * b)."""
    dout, q, k, v, out = (maybe_contiguous(x) for x in (dout, q, k, v, out))
    return _raw.varlen_bwd(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, alibi_slopes, max_seqlen_q,
        max_seqlen_k, dropout_p, softmax_scale, zero_tensors, causal, window_size_left, window_size_right, softcap,
        deterministic, None, rng_state,
    )[3]  # fmt: skip


_flash_attn_forward_fake = _flash_attn_forward.register_fake(_flash_attn_forward._init_fn)
_flash_attn_varlen_forward_fake = _flash_attn_varlen_forward.register_fake(_flash_attn_varlen_forward._init_fn)
_flash_attn_backward_fake = _flash_attn_backward.register_fake(_flash_attn_backward._init_fn)
_flash_attn_varlen_backward_fake = _flash_attn_varlen_backward.register_fake(_flash_attn_varlen_backward._init_fn)

_wrapped_flash_attn_forward = torch.ops.flash_attn._flash_attn_forward
_wrapped_flash_attn_varlen_forward = torch.ops.flash_attn._flash_attn_varlen_forward
_wrapped_flash_attn_backward = torch.ops.flash_attn._flash_attn_backward
_wrapped_flash_attn_varlen_backward = torch.ops.flash_attn._flash_attn_varlen_backward
