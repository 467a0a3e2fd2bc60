"""Stand-ins for the engines of others: their real signatures, assertions and oddities, computed naively on the CPU.

Each says in its own words what the real one does with windows, ALiBi, the LSE and rows without keys, so that an adapter
that forgets one of them gives a wrong number here as it would on a GPU. `CALLS` records the arguments of each call.
"""

import torch
from torch import Tensor

from flash_attn_plus import selection
from flash_attn_plus.backends import cuda_original
from flash_attn_plus.reference import attention_reference

CALLS: list[tuple[str, dict]] = []


def forget() -> None:
    """Drop every answer and warning that selection remembers, and the recorded calls."""
    selection._choose.cache_clear()
    cuda_original.judge.cache_clear()
    selection._warned.clear()
    CALLS.clear()


def record(name: str, given: dict) -> None:
    CALLS.append((name, {k: v for k, v in given.items() if v is not None}))


def compute(q, k, v, left, right, scale, softcap=0.0, slopes=None, **sequences) -> tuple[Tensor, Tensor]:
    """(out in q's dtype, lse float32), both differentiable."""
    out, lse = attention_reference(
        q, k, v, softmax_scale=scale, left=left, right=right, softcap=softcap, alibi_slopes=slopes, dtype=torch.float32,
        **sequences,
    )  # fmt: skip
    return out.to(q.dtype), lse


def gradients(dout, q, k, v, **options) -> tuple[Tensor, ...]:
    q, k, v = (x.detach().float().requires_grad_() for x in (q, k, v))
    out, _ = compute(q, k, v, **options)
    return torch.autograd.grad(out, (q, k, v), dout.float())


def check_rows(*tensors: Tensor) -> None:
    """What kernels with 16-byte loads need and do not check."""
    for x in tensors:
        assert x.stride(-1) == 1
        assert x.shape[-1] % 8 == 0, "head_size must be a multiple of 8"
        assert x.data_ptr() % 16 == 0
        assert all(s * x.element_size() % 16 == 0 for n, s in zip(x.shape, x.stride(), strict=True) if n > 1 and s != 1)


def check_finite(*tensors: Tensor) -> None:
    """What kernels need that multiply rows behind the last sequence by weights of 0."""
    assert all(bool(x.isfinite().all()) for x in tensors)


# FlashAttention-2, as PyTorch and the original extension run it.


def fa2_band(left, right, is_causal, max_q, max_k, slopes) -> tuple[int, int, bool]:
    """The band that the kernels mask by, and whether they run as causal ones."""
    left, right = (-1 if side >= max_k else side for side in (left, right))
    if max_q == 1 and slopes is None:
        is_causal = False
    if is_causal:
        right = 0
    runs_causal = left < 0 and right == 0
    if left < 0 <= right:
        left = max_k
    if right < 0 <= left:
        right = max_k
    return left, right, runs_causal


def fa2_shift(lse, slopes, cu_q, cu_k, seqused, leftpad, len_q, len_k) -> Tensor:
    """lse of causal kernels, whose bias is slope * j: it exceeds the true one by slope * (i + len_k - len_q)."""
    shifted = lse.detach().clone()
    batch = lse.shape[0] if cu_q is None else len(cu_q) - 1
    for n in range(batch):
        rows = slice(0, len_q) if cu_q is None else slice(int(cu_q[n]), int(cu_q[n + 1]))
        keys = len_k if cu_k is None else int(cu_k[n + 1] - cu_k[n])
        keys = keys if seqused is None else int(seqused[n])
        keys -= 0 if leftpad is None else int(leftpad[n])
        position = torch.arange(rows.stop - rows.start) + keys - (rows.stop - rows.start)
        own = slopes[n] if slopes.ndim == 2 else slopes
        part = shifted[n] if cu_q is None else shifted[:, rows]
        part += own[:, None] * position
    return shifted


def fa2_forward(
    q, k, v, cu_q, cu_k, max_q, max_k, scale, is_causal, left, right, softcap=0.0, slopes=None, seqused=None,
    leftpad=None, table=None,
):  # fmt: skip
    check_rows(q, k, v)
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    assert scale > 0.0
    assert (cu_q is None) == (cu_k is None)
    if cu_q is not None and max_q == 1 and q.shape[1] > k.shape[-2] and max(left, right) < 0 and slopes is None:
        assert len(q) == len(cu_q) - 1, "shape '[batch, heads_k, groups, dim]' is invalid"  # it regroups the heads
    left, right, runs_causal = fa2_band(left, right, is_causal, max_q, max_k, slopes)
    sequences = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "seqused_k": seqused, "leftpad_k": leftpad}
    out, lse = compute(q, k, v, left, right, scale, softcap, slopes, **sequences, block_table=table)
    if slopes is not None and runs_causal:
        lse = fa2_shift(lse, slopes, cu_q, cu_k, seqused, leftpad, q.shape[1], k.shape[1])
    return out, lse


def fa2_backward(
    dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale, is_causal, left, right, softcap=0.0, slopes=None
):
    check_rows(dout, q, k, v, out)
    assert dout.is_contiguous()
    own_out, own_lse = fa2_forward(
        q, k, v, cu_q, cu_k, max_q, max_k, scale, is_causal, left, right, softcap, slopes
    )  # the kernels rebuild the weights from this LSE
    covered = slice(0, int(cu_q[-1])) if cu_q is not None else slice(None)
    torch.testing.assert_close(lse[..., covered], own_lse[..., covered], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(out[covered], own_out[covered], rtol=1e-2, atol=1e-2)
    assert lse.is_contiguous()
    left, right, _ = fa2_band(left, right, is_causal, max_q, max_k, slopes)
    return gradients(
        dout, q, k, v, left=left, right=right, scale=scale, softcap=softcap, slopes=slopes,
        cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
    )  # fmt: skip


class Extension:
    """flash_attn_2_cuda of flash-attn 2.8."""

    @staticmethod
    def fwd(q, k, v, out, alibi_slopes, p, scale, is_causal, left, right, softcap, return_softmax, gen):
        record("fwd", {"p": p, "softcap": softcap, "return_softmax": return_softmax, "gen": gen})
        found, lse = fa2_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], scale, is_causal, left, right, softcap, alibi_slopes
        )
        return (found if out is None else out.copy_(found)), lse, None, None

    @staticmethod
    def varlen_fwd(
        q, k, v, out, cu_q, cu_k, seqused_k, leftpad_k, block_table, alibi_slopes, max_q, max_k, p, scale, zero,
        is_causal, left, right, softcap, return_softmax, gen,
    ):  # fmt: skip
        record("varlen_fwd", {"p": p, "zero": zero, "return_softmax": return_softmax, "gen": gen})
        assert block_table is None or k.shape[1] % 256 == 0
        found, lse = fa2_forward(
            q, k, v, cu_q, cu_k, max_q, max_k, scale, is_causal, left, right, softcap, alibi_slopes, seqused_k,
            leftpad_k, block_table,
        )  # fmt: skip
        return (found if out is None else out.copy_(found)), lse, None, None

    @staticmethod
    def bwd(
        dout, q, k, v, out, lse, dq, dk, dv, alibi_slopes, p, scale, is_causal, left, right, softcap, deterministic,
        gen, rng_state,
    ):  # fmt: skip
        record("bwd", {"p": p, "deterministic": deterministic, "gen": gen, "rng_state": rng_state})
        grads = fa2_backward(
            dout, q, k, v, out, lse, None, None, q.shape[1], k.shape[1], scale, is_causal, left, right, softcap,
            alibi_slopes,
        )  # fmt: skip
        for target, gradient in zip((dq, dk, dv), grads, strict=True):
            target.copy_(gradient)

    @staticmethod
    def varlen_bwd(
        dout, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, alibi_slopes, max_q, max_k, p, scale, zero, is_causal, left,
        right, softcap, deterministic, gen, rng_state,
    ):  # fmt: skip
        record("varlen_bwd", {"p": p, "deterministic": deterministic, "gen": gen, "rng_state": rng_state})
        grads = fa2_backward(
            dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale, is_causal, left, right, softcap, alibi_slopes
        )
        for target, gradient in zip((dq, dk, dv), grads, strict=True):
            target.copy_(gradient)


class Operator:
    """An ATen operator's schema with a function behind it."""

    def __init__(self, operator, function):
        self._schema, self._function = operator._schema, function

    def __call__(self, *args, **kwargs):
        names = [a.name for a in self._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        assert len(given) == len(args) + len(kwargs) <= len(names)
        assert given.keys() <= set(names)
        lacking = [a.name for a in self._schema.arguments if a.name not in given and not a.has_default_value()]
        assert not lacking
        record(self._schema.name, given)
        return self._function(**given)


def _side(value: int | None) -> int:
    return -1 if value is None else value


def _torch_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, scale=None,
    window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None,
):  # fmt: skip
    assert dropout_p == 0.0
    assert not return_debug_mask
    out, lse = fa2_forward(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, scale, is_causal, _side(window_size_left),
        _side(window_size_right), 0.0, alibi_slopes, seqused_k,
    )  # fmt: skip
    return out, lse, None, None, None


def _torch_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state,
    unused, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    assert dropout_p == 0.0
    return fa2_backward(
        grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, scale, is_causal,
        _side(window_size_left), _side(window_size_right),
    )  # fmt: skip


def _cudnn_forward(
    query, key, value, attn_bias, compute_log_sumexp, dropout_p, is_causal, return_debug_mask, scale=None
):
    assert attn_bias is None
    assert compute_log_sumexp
    assert dropout_p == 0.0
    assert scale > 0.0
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    check_rows(q, k, v)
    out, lse = compute(q, k, v, -1, q.shape[1] - k.shape[1] if is_causal else -1, scale)
    assert not is_causal or q.shape[1] == k.shape[1], "its diagonal begins in the top-left corner"
    return out.transpose(1, 2), lse[..., None], None, None, 0, 0, None, None, None


def _cudnn_backward(
    grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q, cum_seq_k, max_q,
    max_k, dropout_p, is_causal, scale=None,
):  # fmt: skip
    assert attn_bias is cum_seq_q is cum_seq_k is None
    assert dropout_p == 0.0
    q, k, v, dout = (x.transpose(1, 2) for x in (query, key, value, grad_out))
    check_rows(q, k, v, dout, out.transpose(1, 2))
    _, own = compute(q, k, v, -1, 0 if is_causal else -1, scale)
    torch.testing.assert_close(logsumexp, own[..., None], rtol=1e-3, atol=1e-3)
    grads = gradients(dout, q, k, v, left=-1, right=0 if is_causal else -1, scale=scale)
    return tuple(g.transpose(1, 2) for g in grads)


_aten = torch.ops.aten
TORCH_FA2 = (
    Operator(_aten._flash_attention_forward.default, _torch_forward),
    Operator(_aten._flash_attention_backward.default, _torch_backward),
)
CUDNN = (
    Operator(_aten._scaled_dot_product_cudnn_attention.default, _cudnn_forward),
    Operator(_aten._scaled_dot_product_cudnn_attention_backward.default, _cudnn_backward),
)

# FlashAttention-3: a real operator, so that a real schema is read. Rows without keys get LSE -inf.
FA3_SCHEMA = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, Tensor? out, Tensor? cu_seqlens_q,"
    " Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? seqused_k, int? max_seqlen_q,"
    " int? max_seqlen_k, Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k, Tensor? rotary_cos,"
    " Tensor? rotary_sin, Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale, Tensor? v_descale,"
    " float softmax_scale, bool is_causal, int window_size_left, int window_size_right, float softcap,"
    " bool is_rotary_interleaved, Tensor? scheduler_metadata, int num_splits, bool? pack_gqa, int sm_margin,"
    " Tensor? s_aux, int cp_world_size, int cp_rank, Tensor? cp_tot_seqused_k) -> Tensor[]"
)


def _fa3_forward(
    q, k, v, k_new, v_new, q_v, out, cu_q, cu_k, cu_k_new, seqused_q, seqused_k, max_q, max_k, page_table, batch_idx,
    leftpad_k, rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale, scale, is_causal, left, right,
    softcap, is_rotary_interleaved, scheduler_metadata, num_splits, pack_gqa, sm_margin, s_aux, cp_world_size, cp_rank,
    cp_tot_seqused_k,
):  # fmt: skip
    check_rows(q, k, v)
    assert scale > 0.0
    assert (cp_world_size, cp_rank, sm_margin) == (1, 0, 0)
    assert q.ndim == 3
    check_finite(k, v)
    sequences = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "seqused_k": seqused_k, "block_table": page_table}
    found, lse = compute(q, k, v, left, 0 if is_causal else right, scale, softcap, **sequences)
    lse = lse.masked_fill(lse.isposinf(), float("-inf"))
    return [found.clone(), lse, lse.new_empty(0), lse.new_empty(0)]


_fa3_library = torch.library.Library("flash_attn_plus_fake_fa3", "DEF")
_fa3_library.define(FA3_SCHEMA)
_fa3_library.impl("fwd", _fa3_forward, "CompositeExplicitAutograd")
FA3 = torch.ops.flash_attn_plus_fake_fa3.fwd.default


class Fa4:
    """flash_attn.cute.interface of flash-attn-4 4.0. Rows without keys get LSE -inf."""

    @staticmethod
    def _band(causal, left, right) -> tuple[int, int]:
        assert left is None or left >= 0
        return _side(left), 0 if causal else _side(right)

    @staticmethod
    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
        window_size_left=None, window_size_right=None, return_lse=False, out=None, lse=None,
    ):  # fmt: skip
        check_rows(q, k, v)
        check_finite(k, v)
        assert softmax_scale > 0.0
        assert return_lse
        sequences = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "seqused_k": seqused_k}
        band = Fa4._band(causal, window_size_left, window_size_right)
        found, statistics = compute(q, k, v, *band, softmax_scale, softcap, **sequences)
        return found, statistics.masked_fill(statistics.isposinf(), float("-inf")), None, None, None

    @staticmethod
    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None, dlse=None,
    ):  # fmt: skip
        check_rows(q, k, v, out, dout)
        check_finite(q, k, v, out, dout)
        left, right = Fa4._band(causal, window_size_left, window_size_right)
        leaves = [x.detach().float().requires_grad_() for x in (q, k, v)]
        sequences = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
        own_out, own_lse = compute(*leaves, left, right, softmax_scale, softcap, **sequences)
        arriving = [(own_out, dout.float())] + ([(own_lse, dlse)] if dlse is not None else [])
        return torch.autograd.grad([x for x, _ in arriving], leaves, [g for _, g in arriving])


class FlagGems:
    """flag_gems 5.0.2: its one usable function, with what its host code checks, clamps and confuses."""

    device, vendor_name = "cuda", "nvidia"

    @staticmethod
    def flash_attn_varlen_func(
        q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k=None, seqused_k=None, q_v=None, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size=None, softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None, return_softmax_lse=False, out=None, scheduler_metadata=None,
        q_descale=None, k_descale=None, v_descale=None, s_aux=None, num_splits=0, cp_world_size=1, cp_rank=0,
        cp_tot_seqused_k=None, fa_version=2,
    ):  # fmt: skip
        record("flash_attn_varlen_func", dict(locals()))
        assert (cu_seqlens_k is None) != (seqused_k is None)
        assert (block_table is None) == (seqused_k is None), "without pages seqused_k does not compile"
        assert q.dtype in (torch.float16, torch.bfloat16)
        assert k.size() == v.size()
        assert k.stride() == v.stride()
        assert 16 <= q.shape[-1] <= 256
        assert q.shape[-1] % 8 == 0
        if block_table is not None:
            assert k.stride(0) == k.shape[1] * k.stride(1), "pages are taken to be adjacent"
        left, right = window_size
        if max_seqlen_q == 1 and alibi_slopes is None:
            causal = False
        right = 0 if causal else right
        left, right = (-1 if side >= max_seqlen_k else side for side in (left, right))
        groups = max_seqlen_q == 1 and alibi_slopes is None and q.shape[1] > k.shape[-2] and max(left, right) < 0
        assert not groups, "the LSE is scrambled, and every sequence must have a query"
        is_local = left >= 0
        if is_local:
            assert right >= 0, "-1 is taken literally"
        band = (left, right) if is_local else (-1, 0 if causal else -1)
        sequences = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "seqused_k": seqused_k}
        found, lse = compute(q, k, v, *band, softmax_scale, softcap, alibi_slopes, block_table=block_table, **sequences)
        if alibi_slopes is not None and causal and not is_local:
            lse = FlagGems._shift(lse, alibi_slopes, cu_seqlens_q)
        found = found if out is None else out.copy_(found)
        return (found, lse) if return_softmax_lse else found

    @staticmethod
    def _shift(lse, slopes, cu_q) -> Tensor:
        """Distances are counted from the last query: the LSE lacks slope * (len_q - 1 - i)."""
        shifted = lse.clone()
        for n in range(len(cu_q) - 1):
            length = int(cu_q[n + 1] - cu_q[n])
            own = slopes[n] if slopes.ndim == 2 else slopes
            shifted[:, int(cu_q[n]) : int(cu_q[n + 1])] -= own[:, None] * torch.arange(length - 1, -1, -1)
        return shifted
