"""Collectives along the first dimension for tensor and sequence parallelism, plain and differentiable."""

import torch
import torch.distributed as dist
from torch import Tensor


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's (n, ...) in rank order, (world * n, ...)."""
    out = torch.empty((dist.get_world_size(group) * x.shape[0], *x.shape[1:]), dtype=x.dtype, device=x.device)
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's share (n, ...) of the sum over ranks of x (world * n, ...)."""
    world = dist.get_world_size(group)
    if x.shape[0] % world:
        raise ValueError(f"the first dimension, {x.shape[0]}, must be divisible by the {world} ranks of the group")
    out = torch.empty((x.shape[0] // world, *x.shape[1:]), dtype=x.dtype, device=x.device)
    dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
    return out


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks; x itself stays as it is."""
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group)
    return out


class ReduceScatter(torch.autograd.Function):
    """`reduce_scatter`, whose gradient is gathered."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad, ctx.group), None


class AllReduce(torch.autograd.Function):
    """`all_reduce`, whose gradient is every rank's own."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
