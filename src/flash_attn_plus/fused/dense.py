"""Dense layers and two-layer MLPs, differentiable, with tensor and sequence parallelism."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from flash_attn_plus.arguments import autocast_dtype
from flash_attn_plus.derivatives import once_differentiable
from flash_attn_plus.fused.activation import activation_backward, activation_forward
from flash_attn_plus.fused.collective import all_gather, all_reduce, reduce_scatter


def _cast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in the dtype of the active autocast region."""
    dtype = autocast_dtype(tensors[0].device)
    return tensors if dtype is None else tuple(None if x is None else x.to(dtype) for x in tensors)


def _gather(x: Tensor, group: dist.ProcessGroup | None, sequence_parallel: bool) -> Tensor:
    return all_gather(x, group) if group is not None and sequence_parallel else x


def _reduce_gradient(dx: Tensor, group: dist.ProcessGroup | None, sequence_parallel: bool) -> Tensor:
    """The gradient of an input that every rank of a column-parallel layer has used."""
    if group is None:
        return dx
    return reduce_scatter(dx, group) if sequence_parallel else all_reduce(dx, group)


def _input_gradient(dout: Tensor, weight: Tensor, residual_gradient: Tensor | None) -> Tensor:
    """dout @ weight, with the residual's gradient added inside the matrix multiplication."""
    if residual_gradient is None:
        return dout @ weight
    flat = torch.addmm(
        residual_gradient.reshape(-1, weight.shape[1]).to(dout.dtype), dout.reshape(-1, dout.shape[-1]), weight
    )
    return flat.view(*dout.shape[:-1], weight.shape[1])


def _parameter_gradients(dout: Tensor, x: Tensor, has_bias: bool) -> tuple[Tensor, Tensor | None]:
    dout = dout.reshape(-1, dout.shape[-1])
    return dout.t() @ x.reshape(-1, x.shape[-1]), dout.sum(0) if has_bias else None


class LinearFunction(torch.autograd.Function):
    """Linear layer; with a process group a column-parallel one. Returns x too when asked for the residual."""

    @staticmethod
    def forward(ctx, x, weight, bias, return_residual=False, process_group=None, sequence_parallel=True):
        original = x
        x, weight, bias = _cast(x, weight, bias)
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        ctx.return_residual, ctx.group, ctx.sequence_parallel = return_residual, process_group, sequence_parallel
        out = F.linear(_gather(x, process_group, sequence_parallel), weight, bias)
        return (out, original) if return_residual else out

    @staticmethod
    def backward(ctx, dout, *residual_gradient):
        x, weight = ctx.saved_tensors
        group, dx, dweight, dbias = ctx.group, None, None, None
        dout = dout.to(weight.dtype)
        if ctx.needs_input_grad[0]:
            residual = residual_gradient[0] if residual_gradient else None
            if group is None:
                dx = _input_gradient(dout, weight, residual)
            else:
                dx = _reduce_gradient(dout @ weight, group, ctx.sequence_parallel)
                dx = dx if residual is None else dx + residual
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            dweight, dbias = _parameter_gradients(dout, _gather(x, group, ctx.sequence_parallel), ctx.has_bias)
        return dx, dweight, dbias, None, None, None


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    return_residual: bool = False,
    process_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """x @ weight.T + bias, and x itself with `return_residual`, whose gradient then costs no pass of its own.

    With `process_group` the weight is this rank's share of the output features; x (n, ...) is gathered along its first
    dimension when `sequence_parallel`, else every rank holds all of it.
    """
    if process_group is None and not return_residual:
        return F.linear(x, weight, bias)
    return LinearFunction.apply(x, weight, bias, return_residual, process_group, sequence_parallel)


def mlp_forward(
    ctx, x, weight1, bias1, weight2, bias2, activation="gelu_approx", save_pre_act=True, return_residual=False,
    checkpoint_lvl=0, process_group=None, sequence_parallel=True,
):  # fmt: skip
    """linear2(act(linear1(x))); ctx keeps as much for `mlp_backward` as `checkpoint_lvl` says."""
    original = x
    x, weight1, bias1, weight2, bias2 = _cast(x, weight1, bias1, weight2, bias2)
    pre_activation = F.linear(_gather(x, process_group, sequence_parallel), weight1, bias1)
    hidden = activation_forward(pre_activation, activation)
    level = checkpoint_lvl if save_pre_act else 2
    kept = [pre_activation, hidden][: 2 - level]
    ctx.save_for_backward(x, weight1, weight2, bias1, *kept)
    ctx.activation, ctx.group, ctx.sequence_parallel = activation, process_group, sequence_parallel
    ctx.has_bias = (bias1 is not None, bias2 is not None)
    out = F.linear(hidden, weight2, bias2)
    return (out, original) if return_residual else out


def mlp_backward(ctx, dout, *residual_gradient):
    """Gradients of x, weight1, bias1, weight2 and bias2."""
    x, weight1, weight2, bias1, *kept = ctx.saved_tensors
    group = ctx.group
    dout = dout.to(weight2.dtype)
    gathered = _gather(x, group, ctx.sequence_parallel)
    pre_activation = kept[0] if kept else F.linear(gathered, weight1, bias1)
    hidden = kept[1] if len(kept) == 2 else activation_forward(pre_activation, ctx.activation)
    dweight2, dbias2 = _parameter_gradients(dout, hidden, ctx.has_bias[1])
    dpre = activation_backward(dout @ weight2, pre_activation, ctx.activation)
    dweight1, dbias1 = _parameter_gradients(dpre, gathered, ctx.has_bias[0])
    dx = None
    if ctx.needs_input_grad[0]:
        residual = residual_gradient[0] if residual_gradient else None
        if group is None:
            dx = _input_gradient(dpre, weight1, residual)
        else:
            dx = _reduce_gradient(dpre @ weight1, group, ctx.sequence_parallel)
            dx = dx if residual is None else dx + residual
    return dx, dweight1, dbias1, dweight2, dbias2


class MLPFunction(torch.autograd.Function):
    """linear2(act(linear1(x))); `heuristic` has no influence."""

    @staticmethod
    def forward(
        ctx, x, weight1, bias1, weight2, bias2, activation="gelu_approx", save_pre_act=True, return_residual=False,
        checkpoint_lvl=0, heuristic=0, process_group=None, sequence_parallel=True,
    ):  # fmt: skip
        return mlp_forward(
            ctx, x, weight1, bias1, weight2, bias2, activation, save_pre_act, return_residual, checkpoint_lvl,
            process_group, sequence_parallel,
        )  # fmt: skip

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, *residual_gradient):
        return *mlp_backward(ctx, dout, *residual_gradient), *[None] * 7


def share_of(size: int, parts: int, index: int, multiple_of: int = 1) -> int:
    """The size of one part of an even split in units of `multiple_of`; the first parts get a unit more if need be.

    Raises:
        ValueError: size is not divisible by multiple_of.
    """
    if size % multiple_of:
        raise ValueError(f"{size} features cannot be split in units of {multiple_of}; make one divisible by the other")
    units, more = divmod(size // multiple_of, parts)
    return (units + int(index < more)) * multiple_of
