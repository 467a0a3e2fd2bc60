"""The engine's operators: schemas, fakes, the allocation of every output, and the call into a backend."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from flash_attn_plus import env
from flash_attn_plus.backends.base import Backend
from flash_attn_plus.checks import check_arguments, check_values, refuse_nested, refuse_strangers
from flash_attn_plus.derivatives import refuse_tangents
from flash_attn_plus.dispatch import may_skip_dispatcher
from flash_attn_plus.errors import InvalidArgument
from flash_attn_plus.problem import AttentionInputs, AttentionProblem, describe
from flash_attn_plus.selection import choose, state

_SEQUENCES = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? seqused_k,"
    " Tensor? leftpad_k, Tensor? block_table"
)
_OPTIONS = (
    "Tensor? alibi_slopes, Tensor? rng_state, float dropout_p, float softmax_scale,"
    " SymInt window_size_left, SymInt window_size_right, float softcap"
)
_library = torch.library.Library("flash_attn_plus", "DEF")
_library.define(f"forward(Tensor q, Tensor k, Tensor v, {_SEQUENCES}, {_OPTIONS}) -> (Tensor out, Tensor lse)")
_library.define(
    "backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse,"
    f" Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, {_SEQUENCES}, {_OPTIONS}, bool deterministic) -> Tensor delta"
)


def rows_last(x: Tensor | None) -> Tensor | None:
    """x itself when its last stride is 1, else a contiguous copy (kernels read rows of adjacent elements)."""
    return x if x is None or x.stride(-1) == 1 or (x.shape[-1] == 1 and x.is_contiguous()) else x.contiguous()


def _lse_shape(q: Tensor, is_varlen: bool) -> tuple[int, ...]:
    return (q.shape[1], q.shape[0]) if is_varlen else (q.shape[0], q.shape[2], q.shape[1])


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _has_shape_of_q(q: Tensor, v: Tensor) -> bool:
    """Whether out is laid out as q is."""
    return q.is_contiguous() and q.shape[-1] == v.shape[-1]


def allocate_outputs(q: Tensor, v: Tensor, is_varlen: bool) -> tuple[Tensor, Tensor]:
    """Contiguous `out` like q with v's head dim, and float32 `lse`: made here, or where plans remember their shapes."""
    if _has_shape_of_q(q, v):
        out = torch.empty_like(q)
    else:
        out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
    return out, torch.empty(_lse_shape(q, is_varlen), dtype=_lse_dtype(q), device=q.device)


def allocate_alike(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """`allocate_outputs` for plans, of tensors of such shapes: `torch.empty` takes more than twice the time."""
    return torch.empty_like(out), torch.empty_like(lse)


def allocate_gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous tensors like these."""
    contiguous = torch.contiguous_format
    return tuple(torch.empty_like(x, memory_format=contiguous) for x in tensors)  # less than half the time of empty


def _is_empty(problem: AttentionProblem) -> bool:
    return problem.seqlen_q == 0 or problem.seqlen_k == 0


def _has_no_gradient(problem: AttentionProblem, inputs: AttentionInputs) -> bool:
    return _is_empty(problem) or inputs.q.numel() == 0 or inputs.k.numel() == 0


def run_forward(problem: AttentionProblem, inputs: AttentionInputs, out: Tensor, lse: Tensor) -> None:
    """Fill out and lse by the chosen backend."""
    if out.numel() == 0 and lse.numel() == 0:
        return
    if _is_empty(problem):
        out.zero_()
        lse.fill_(float("inf"))
        return
    choose(problem, inputs).forward(problem, inputs, out, lse)


def plan_forward(inputs: AttentionInputs, left: int, right: int, num_splits: int = 0) -> Callable[..., None]:
    """What fills (out, lse) for checked inputs over a cache, and for others of the same shapes, strides and numbers."""
    problem = describe(inputs, 0, 0, left, right)._replace(
        num_splits=num_splits, cache_dtype=None if inputs.k.dtype == inputs.q.dtype else inputs.k.dtype
    )
    if _is_empty(problem) or inputs.q.numel() == 0:
        return partial(run_forward, problem)
    return choose(problem, inputs).plan_forward(problem, inputs)


def plan_backward(problem: AttentionProblem, inputs: AttentionInputs) -> Callable[..., tuple[tuple, Tensor | None]]:
    """What takes (gradients, inputs, dout, out, lse, dlse), for others of the same shapes, strides and numbers too.

    It returns the gradients dq, dk and dv, which it fills, and delta, float32 like lse. Where they are None it returns
    new ones or such of the backend's, which may come without delta.
    """
    if _has_no_gradient(problem, inputs):
        return _zero_gradients
    return _BackwardPlan(choose(problem, inputs), problem)


def _zero_gradients(
    grads: tuple | None, inputs: AttentionInputs, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None
) -> tuple[tuple, Tensor]:
    grads = allocate_gradients(*inputs[:3]) if grads is None else grads
    for x in grads:
        x.zero_()
    return grads, torch.zeros_like(lse)


class _BackwardPlan:
    """What a backend does for gradients, once their layout is known by the first call."""

    def __init__(self, backend: Backend, problem: AttentionProblem):
        self._backend, self._problem = backend, problem
        self._fill: Callable[..., None] | None = None

    def __call__(
        self, grads: tuple | None, inputs: AttentionInputs, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None
    ) -> tuple[tuple, Tensor | None]:
        if grads is None:
            own = self._backend.gradients(self._problem, inputs, dout, out, lse) if dlse is None else None
            if own is not None:
                return own, None
            grads = allocate_gradients(*inputs[:3])
        (dq, dk, dv), delta = grads, torch.empty_like(lse)
        fill = self._fill
        if fill is None:
            fill = self._backend.plan_backward(self._problem, inputs, dout, out, lse, dlse, dq, dk, dv)
            self._fill = fill
        fill(inputs, dout, out, lse, dlse, dq, dk, dv, delta)
        return grads, delta


def gather_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    rng_state: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    softcap: float,
) -> AttentionInputs:
    """Checked inputs with last strides of 1."""
    inputs = AttentionInputs(
        rows_last(q), rows_last(k), rows_last(v), softmax_scale, softcap, dropout_p,
        cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table, alibi_slopes, rng_state,
    )  # fmt: skip
    check_arguments(inputs)
    if dropout_p > 0.0 and (rng_state is None or rng_state.dtype != torch.int64 or rng_state.shape != (2,)):
        raise InvalidArgument("rng_state must be an int64 tensor of shape (2,), seed and offset, when dropout_p > 0")
    return inputs


def _shape_of(x: Tensor | None) -> tuple | None:
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device)


def _shapes_of(*tensors: Tensor | None) -> tuple | None:
    for x in tensors:  # in a fifth of the time where there is none, as in most calls
        if x is not None:
            return tuple(map(_shape_of, tensors))
    return None


# Plans of recent calls: validation, description, choice and launch are worked out once for calls that differ in
# their tensors' contents only. Emptied when full, which a stream of ever new shapes brings about.
_plans: dict[tuple, Callable[[AttentionInputs], tuple[Tensor, Tensor]]] = {}
_backward_plans: dict[tuple, Callable[..., tuple[tuple, Tensor | None]]] = {}
_MAX_PLANS = 4096


def _remember(plans: dict[tuple, Callable], key: tuple, plan: Callable) -> None:
    if len(plans) >= _MAX_PLANS:
        plans.clear()
    plans[key] = plan


def _forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, leftpad_k, block_table,
    alibi_slopes, rng_state, dropout_p, softmax_scale, window_size_left, window_size_right, softcap,
):  # fmt: skip
    try:
        key = (
            q.shape, q.stride(), q.dtype, q.device, k.shape, k.stride(), k.dtype, k.device,
            v.shape, v.stride(), v.dtype, v.device, (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15,
            max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, window_size_left, window_size_right, softcap, state(),
            _shapes_of(cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table, alibi_slopes, rng_state),
        )  # fmt: skip
    except AttributeError:
        refuse_strangers(
            {
                "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "seqused_k": seqused_k,
                "leftpad_k": leftpad_k, "block_table": block_table, "alibi_slopes": alibi_slopes,
            }
        )  # fmt: skip
        raise
    plan = _plans.get(key)
    if plan is None:
        return _forward_unplanned(
            key, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, leftpad_k, block_table,
            alibi_slopes, rng_state, dropout_p, softmax_scale, window_size_left, window_size_right, softcap,
        )  # fmt: skip
    inputs = AttentionInputs(
        q, k, v, softmax_scale, softcap, dropout_p,
        cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table, alibi_slopes, rng_state,
    )  # fmt: skip
    return plan(inputs)


def _of_shape(shape: tuple[int, ...], dtype: torch.dtype, where: torch.device) -> Tensor:
    """A tensor of which torch.empty_like makes a contiguous one; it holds one number."""
    return torch.empty(1, dtype=dtype, device=where).expand(shape)


def _plan_allocated(
    fill: Callable[..., None], x: AttentionInputs, is_varlen: bool
) -> Callable[[AttentionInputs], tuple[Tensor, Tensor]]:
    """What allocates (out, lse) as `allocate_outputs` does, and fills them."""
    q = x.q
    out_like = None if _has_shape_of_q(q, x.v) else _of_shape((*q.shape[:-1], x.v.shape[-1]), q.dtype, q.device)
    lse_like = _of_shape(_lse_shape(q, is_varlen), _lse_dtype(q), q.device)

    def run(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        out, lse = allocate_alike(inputs.q if out_like is None else out_like, lse_like)
        fill(inputs, out, lse)
        return out, lse

    return run


def _forward_unplanned(
    key, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, leftpad_k, block_table,
    alibi_slopes, rng_state, dropout_p, softmax_scale, window_size_left, window_size_right, softcap,
):  # fmt: skip
    inputs = gather_inputs(
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table,
        alibi_slopes, rng_state, dropout_p, softmax_scale, softcap,
    )  # fmt: skip
    if env.debug():
        check_values(inputs, max_seqlen_q, max_seqlen_k)
    problem = describe(inputs, max_seqlen_q, max_seqlen_k, window_size_left, window_size_right)
    if _is_empty(problem) or q.numel() == 0 or v.shape[-1] == 0:
        out, lse = allocate_outputs(q, v, cu_seqlens_q is not None)
        run_forward(problem, inputs, out, lse)
        return out, lse
    backend = choose(problem, inputs)
    plan = backend.plan_outputs(problem, inputs)
    if plan is None:
        plan = _plan_allocated(backend.plan_forward(problem, inputs), inputs, cu_seqlens_q is not None)
    results = plan(inputs)
    was_copied = inputs.q is not q or inputs.k is not k or inputs.v is not v
    if not (was_copied or env.debug()):
        _remember(_plans, key, plan)
    return results


def _forward_fake(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, leftpad_k, block_table,
    alibi_slopes, rng_state, dropout_p, softmax_scale, window_size_left, window_size_right, softcap,
):  # fmt: skip
    gather_inputs(
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table,
        alibi_slopes, rng_state, dropout_p, softmax_scale, softcap,
    )  # fmt: skip
    return allocate_outputs(q, v, cu_seqlens_q is not None)


def _check_gradients(
    x: AttentionInputs, dout: Tensor, out: Tensor, lse: Tensor, grads: tuple[Tensor, ...] | None
) -> None:
    is_varlen = x.cu_seqlens_q is not None
    expected = (*x.q.shape[:-1], x.v.shape[-1])
    for name, t in zip(
        ("dout", "out", "softmax_lse", "dq", "dk", "dv"), (dout, out, lse, *(grads or ())), strict=False
    ):
        if t.device != x.q.device:
            raise InvalidArgument(f"{name} must be on the device of q, {x.q.device}, not on {t.device}")
    if lse.dtype != _lse_dtype(x.q):
        raise InvalidArgument(f"softmax_lse must have dtype {_lse_dtype(x.q)}, not {lse.dtype}")
    for name, t in (("dout", dout), ("out", out)):
        if t.dtype != x.q.dtype:
            raise InvalidArgument(f"query and {name} must have the same dtype: {name} has {t.dtype}, q has {x.q.dtype}")
        if t.shape != expected:
            raise InvalidArgument(f"{name} must have shape {tuple(expected)}, not {tuple(t.shape)}")
    if lse.shape != _lse_shape(x.q, is_varlen):
        raise InvalidArgument(f"softmax_lse must have shape {_lse_shape(x.q, is_varlen)}, not {tuple(lse.shape)}")
    for name, t, like in zip(("dq", "dk", "dv"), grads or (), (x.q, x.k, x.v), strict=False):
        if t.dtype != like.dtype:
            raise InvalidArgument(
                f"query and {name} must have the same dtype: {name} has {t.dtype}, q has {like.dtype}"
            )
        if t.shape != like.shape:
            raise InvalidArgument(f"{name} must have shape {tuple(like.shape)}, not {tuple(t.shape)}")
        if t.stride(-1) != 1 and t.shape[-1] != 1:
            raise InvalidArgument(f"{name} must have contiguous last dimension; pass a buffer whose last stride is 1")
    if x.block_table is not None or x.seqused_k is not None or x.leftpad_k is not None:
        raise InvalidArgument("block_table, seqused_k and leftpad_k have no backward; call under torch.no_grad()")


def _differentiate(
    grads, dout, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, leftpad_k,
    block_table, alibi_slopes, rng_state, dropout_p, softmax_scale, window_size_left, window_size_right, softcap,
    deterministic,
):  # fmt: skip
    """(dq, dk, dv) and delta; the gradients in `grads`, or where that is None in new tensors and without delta."""
    is_deterministic = bool(deterministic) or torch.are_deterministic_algorithms_enabled()
    key = (
        q.shape, q.stride(), q.dtype, q.device, k.shape, k.stride(), k.dtype, k.device,
        v.shape, v.stride(), v.dtype, v.device, (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15,
        dout.shape, dout.stride(), dout.dtype, out.shape, out.stride(), out.dtype, lse.shape, lse.dtype,
        dout.device, out.device, lse.device, dlse is None,
        (dout.data_ptr() | out.data_ptr()) & 15, grads and tuple((_shape_of(x), x.data_ptr() & 15) for x in grads),
        max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, window_size_left, window_size_right, softcap,
        is_deterministic, state(),
        _shapes_of(cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table, alibi_slopes, rng_state),
    )  # fmt: skip
    plan = _backward_plans.get(key)
    if plan is None:
        inputs = gather_inputs(
            q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table,
            alibi_slopes, rng_state, dropout_p, softmax_scale, softcap,
        )  # fmt: skip
        _check_gradients(inputs, dout, out, lse, grads)
        problem = describe(
            inputs, max_seqlen_q, max_seqlen_k, window_size_left, window_size_right,
            is_backward=True, is_deterministic=is_deterministic, has_dlse=dlse is not None,
        )  # fmt: skip
        plan = plan_backward(problem, inputs)
        if inputs.q is q and inputs.k is k and inputs.v is v:
            _remember(_backward_plans, key, plan)
    else:
        inputs = AttentionInputs(
            q, k, v, softmax_scale, softcap, dropout_p,
            cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table, alibi_slopes, rng_state,
        )  # fmt: skip
    dlse = None if dlse is None else dlse.contiguous()
    return plan(grads, inputs, rows_last(dout), rows_last(out), lse.contiguous(), dlse)


def backward_into(dout, q, k, v, out, lse, dlse, dq, dk, dv, *rest) -> Tensor:
    """The operator's implementation: gradients go into dq, dk and dv, delta is returned."""
    return _differentiate((dq, dk, dv), dout, q, k, v, out, lse, dlse, *rest)[1]


def _backward_fake(
    dout, q, k, v, out, lse, dlse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k,
    leftpad_k, block_table, alibi_slopes, rng_state, dropout_p, softmax_scale, window_size_left, window_size_right,
    softcap, deterministic,
):  # fmt: skip
    inputs = gather_inputs(
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table,
        alibi_slopes, rng_state, dropout_p, softmax_scale, softcap,
    )  # fmt: skip
    _check_gradients(inputs, dout, out, lse, (dq, dk, dv))
    return torch.empty(_lse_shape(q, cu_seqlens_q is not None), dtype=lse.dtype, device=q.device)


_library.impl("forward", _forward, "CompositeExplicitAutograd")
_library.impl("backward", backward_into, "CompositeExplicitAutograd")
torch.library.register_fake("flash_attn_plus::forward", _forward_fake, lib=_library)
torch.library.register_fake("flash_attn_plus::backward", _backward_fake, lib=_library)

_forward_operator = torch.ops.flash_attn_plus.forward.default
_backward_operator = torch.ops.flash_attn_plus.backward.default


def forward(q: Tensor, k: Tensor, v: Tensor, *rest) -> tuple[Tensor, Tensor]:
    """(out, lse) by the operator; the arguments are those of its schema."""
    if not torch.compiler.is_compiling():
        if may_skip_dispatcher(q, k, v):
            return _forward(q, k, v, *rest)
        refuse_nested(q, k, v)
        refuse_tangents(q, k, v)
    return _forward_operator(q, k, v, *rest)


def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest) -> Tensor:
    """delta, with gradients written into dq, dk and dv, by the operator; the arguments are those of its schema."""
    if not torch.compiler.is_compiling() and may_skip_dispatcher(dout, q, k, v):
        return backward_into(dout, q, k, v, *rest)
    return _backward_operator(dout, q, k, v, *rest)


def gradients(dout, q, k, v, out, lse, dlse, *rest) -> tuple[Tensor, ...]:
    """dq, dk and dv in new tensors; the arguments are those of the operator but for the three."""
    if not torch.compiler.is_compiling() and may_skip_dispatcher(dout, q, k, v):
        return _differentiate(None, dout, q, k, v, out, lse, dlse, *rest)[0]
    grads = allocate_gradients(q, k, v)
    _backward_operator(dout, q, k, v, out, lse, dlse, *grads, *rest)
    return grads
