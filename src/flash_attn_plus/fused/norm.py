"""Layer norm and RMS norm with residual, second branch, row scale and dropout in one pass, differentiable."""

import torch
from torch import Tensor

from flash_attn_plus.errors import InvalidArgument
from flash_attn_plus.fused import norm_launch, norm_torch
from flash_attn_plus.fused.path import is_direct, uses_triton

MAX_ROW_BYTES = 65536  # a row lives in the registers of one program

FORWARD_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? x1, Tensor? weight1, Tensor? bias1,"
    " Tensor? rowscale, Tensor? seeds, float eps, float dropout_p, bool zero_centered_weight, bool is_rms_norm,"
    " Tensor(a!) y, Tensor(b!)? y1, Tensor(c!)? t, Tensor(d!)? mean, Tensor(e!) rstd,"
    " Tensor(f!)? mask, Tensor(g!)? mask1) -> ()"
)
BACKWARD_SCHEMA = (
    "(Tensor dy, Tensor t, Tensor weight, Tensor? bias, Tensor? dy1, Tensor? weight1, Tensor? dt, Tensor? rowscale,"
    " Tensor? seeds, Tensor? mean, Tensor rstd, float dropout_p, bool zero_centered_weight, bool is_rms_norm,"
    " Tensor(a!) dx, Tensor(b!)? dx1, Tensor(c!)? dresidual, Tensor(d!)? y, Tensor(e!) dweight, Tensor(f!)? dbias,"
    " Tensor(g!)? dweight1, Tensor(h!)? dbias1) -> ()"
)


def _adjacent(tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """The tensors with adjacent elements along their last dimension."""
    return [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors]


def forward_into(*arguments) -> None:
    """The forward operator: fill the outputs by the Triton kernel or by PyTorch."""
    x = arguments[0]
    if x.numel() > 0:
        run = (norm_launch if uses_triton(x) else norm_torch).norm_forward
        run(*_adjacent(arguments[:9]), *arguments[9:])


def backward_into(*arguments) -> None:
    """The backward operator: fill the gradients by the Triton kernel or by PyTorch."""
    t = arguments[1]
    if t.numel() > 0:
        run = (norm_launch if uses_triton(t) else norm_torch).norm_backward
        run(*_adjacent(arguments[:11]), *arguments[11:])
        return
    for gradient in arguments[-4:]:
        if gradient is not None:
            gradient.zero_()


_library = torch.library.Library("flash_attn_plus", "FRAGMENT")
_library.define(f"norm_forward{FORWARD_SCHEMA}")
_library.define(f"norm_backward{BACKWARD_SCHEMA}")
_library.impl("norm_forward", forward_into, "CompositeExplicitAutograd")
_library.impl("norm_backward", backward_into, "CompositeExplicitAutograd")
torch.library.register_fake("flash_attn_plus::norm_forward", lambda *_: None, lib=_library)
torch.library.register_fake("flash_attn_plus::norm_backward", lambda *_: None, lib=_library)


def rows_of(x: Tensor | None, cols: int) -> Tensor | None:
    """x as (rows, cols), a view where its strides allow."""
    return x if x is None or x.dim() == 2 else x.reshape(-1, cols)


def _empty(like: Tensor, dtype: torch.dtype) -> Tensor:
    if like.dtype == dtype and like.is_contiguous():
        return torch.empty_like(like)  # half the host time
    return torch.empty(like.shape, dtype=dtype, device=like.device)


def draw_seeds(rows: int, branches: int, device: torch.device) -> Tensor:
    """One int64 seed a row and branch from torch's generator of the device; reseeding it reproduces the dropout."""
    return torch.randint(0, 2**62, (rows * branches,), dtype=torch.int64, device=device)


def _check_buffer(name: str, buffer: Tensor | None, x: Tensor) -> None:
    if buffer is None:
        return
    if buffer.shape != x.shape or buffer.device != x.device:
        raise InvalidArgument(
            f"{name} must have the shape and device of x, {tuple(x.shape)} on {x.device}, not {tuple(buffer.shape)} on"
            f" {buffer.device}"
        )
    if buffer.stride(-1) != 1:
        raise InvalidArgument(f"{name} must have contiguous last dimension; its stride there is {buffer.stride(-1)}")


def _check(x: Tensor, dropout_p: float, weight, bias, weight1, bias1) -> None:
    if not x.is_floating_point():
        raise InvalidArgument(f"x must hold floating-point numbers, not {x.dtype}")
    if x.shape[-1] * x.element_size() > MAX_ROW_BYTES:
        raise InvalidArgument(
            f"This norm doesn't support feature dim >= 64KB: x has {x.shape[-1]} features of {x.element_size()} bytes;"
            " use torch.nn.functional.layer_norm or rms_norm"
        )
    if weight is None:
        raise InvalidArgument("weight must be given; pass ones for a norm without a scale")
    if bias1 is not None and weight1 is None:
        raise InvalidArgument("bias1 needs weight1, without which there is no second output")
    expected = x.shape[-1:]
    for name, p in (("weight", weight), ("bias", bias), ("weight1", weight1), ("bias1", bias1)):
        if p is not None and p.shape != expected:
            raise InvalidArgument(f"{name} must have shape {tuple(expected)}, not {tuple(p.shape)}")
    if not 0.0 <= dropout_p < 1.0:
        raise InvalidArgument(f"dropout_p must be in [0, 1), not {dropout_p}; pass a probability below 1")


def norm_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Not differentiable; x is (rows, cols), as are the other tensors of its shape; buffers have adjacent elements.

    Returns:
        (y, y1, mean, rstd, t, seeds, mask, mask1); t is x itself when nothing changes x; mean is None for RMS norm.
    """
    _check(x, dropout_p, weight, bias, weight1, bias1)
    _check_buffer("out", out, x)
    _check_buffer("residual_out", residual_out, x)
    if out is not None and out_dtype not in (None, out.dtype):
        raise InvalidArgument(f"out has dtype {out.dtype}, but out_dtype is {out_dtype}; pass one of the two")
    rows, device = x.shape[0], x.device
    statistics_dtype = norm_torch.accumulation_dtype(x.dtype)
    if residual is not None:
        residual_dtype = residual.dtype
    y = _empty(x, out_dtype or x.dtype) if out is None else out
    y1 = None if weight1 is None else _empty(x, y.dtype)
    is_changed = (
        residual is not None or x1 is not None or rowscale is not None or dropout_p > 0.0
        or (residual_dtype is not None and residual_dtype != x.dtype) or residual_out is not None
    )  # fmt: skip
    t = residual_out
    if is_changed and t is None:
        t = _empty(x, residual_dtype or x.dtype)
    mean = None if is_rms_norm else torch.empty(rows, dtype=statistics_dtype, device=device)
    rstd = torch.empty(rows, dtype=statistics_dtype, device=device)
    seeds = draw_seeds(rows, 1 if x1 is None else 2, device) if dropout_p > 0.0 else None
    has_mask = return_dropout_mask and dropout_p > 0.0
    mask = torch.empty(x.shape, dtype=torch.bool, device=device) if has_mask else None
    mask1 = torch.empty(x.shape, dtype=torch.bool, device=device) if has_mask and x1 is not None else None
    inputs = (x, weight, bias, residual, x1, weight1, bias1, rowscale, seeds)
    run = forward_into if is_direct(*inputs) else torch.ops.flash_attn_plus.norm_forward
    run(
        *inputs, float(eps), dropout_p, zero_centered_weight, is_rms_norm, y, y1, t, mean, rstd, mask, mask1
    )  # fmt: skip
    return y, y1, mean, rstd, x if t is None else t, seeds, mask, mask1


def norm_backward(
    dy: Tensor,
    t: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dt: Tensor | None = None,
    dy1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    seeds: Tensor | None = None,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    has_residual: bool = False,
    has_x1: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    x_dtype: torch.dtype | None = None,
    recompute_output: bool = False,
) -> tuple[Tensor | None, ...]:
    """Gradients of `norm_forward`; all (rows, cols).

    Returns:
        (dx, dweight, dbias, dresidual, dx1, dweight1, dbias1, y); what was not asked for is None.
    """
    x_dtype = x_dtype or t.dtype
    dx = _empty(t, x_dtype)
    is_plain = dropout_p == 0.0 and rowscale is None  # then every branch receives the same gradient
    dresidual = _empty(t, t.dtype) if has_residual and not (is_plain and x_dtype == t.dtype) else None
    dx1 = _empty(t, x_dtype) if has_x1 and dropout_p > 0.0 else None
    y = _empty(t, dy.dtype) if recompute_output else None
    dweight, dbias, dweight1, dbias1 = (
        None if p is None else torch.empty_like(p) for p in (weight, bias, weight1, bias1)
    )
    inputs = (dy, t, weight, bias, dy1, weight1, dt, rowscale, seeds, mean, rstd)
    run = backward_into if is_direct(*inputs) else torch.ops.flash_attn_plus.norm_backward
    run(
        *inputs, dropout_p, zero_centered_weight, is_rms_norm, dx, dx1, dresidual, y, dweight, dbias, dweight1, dbias1
    )  # fmt: skip
    if has_residual and dresidual is None:
        dresidual = dx
    if has_x1 and dx1 is None:
        dx1 = dx
    return dx, dweight, dbias, dresidual, dx1, dweight1, dbias1, y
