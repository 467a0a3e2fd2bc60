"""Collectives along the first dimension, plain and differentiable, and the care of parameters that ranks share."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flash_attn_plus.fused.collective import AllReduce as AllReduceFunc
from flash_attn_plus.fused.collective import ReduceScatter as ReduceScatterFunc
from flash_attn_plus.fused.dense import share_of


def all_gather_raw(input_: Tensor, process_group, async_op: bool = False):
    """Every rank's (n, ...) in rank order, (world * n, ...), and a handle to wait for (None unless `async_op`)."""
    out = input_.new_empty(process_group.size() * input_.shape[0], *input_.shape[1:])
    return out, dist.all_gather_into_tensor(out, input_.contiguous(), group=process_group, async_op=async_op)


def reduce_scatter_raw(input_: Tensor, process_group, async_op: bool = False):
    """This rank's share (n, ...) of the sum over ranks of (world * n, ...), and a handle."""
    world = process_group.size()
    assert input_.shape[0] % world == 0, f"the first dimension, {input_.shape[0]}, must be divisible by {world} ranks"
    out = input_.new_empty(input_.shape[0] // world, *input_.shape[1:])
    return out, dist.reduce_scatter_tensor(out, input_.contiguous(), group=process_group, async_op=async_op)


def all_reduce_raw(input_: Tensor, process_group, async_op: bool = False):
    """The sum over ranks, written into input_ where that is contiguous, and a handle."""
    input_ = input_.contiguous()
    return input_, dist.all_reduce(input_, group=process_group, async_op=async_op)


class AllGatherFunc(torch.autograd.Function):
    """`all_gather_raw`, whose gradient is reduced and scattered."""

    @staticmethod
    def forward(ctx, input_, process_group):
        ctx.process_group = process_group
        return all_gather_raw(input_, process_group)[0]

    @staticmethod
    def backward(ctx, grad_output):
        return reduce_scatter_raw(grad_output, ctx.process_group)[0], None


all_gather = AllGatherFunc.apply
reduce_scatter = ReduceScatterFunc.apply
all_reduce = AllReduceFunc.apply


def sync_shared_params(model: nn.Module, process_group) -> None:
    """Give parameters marked `_shared_params` the values of the group's first rank."""
    source = dist.get_global_rank(process_group, 0)
    with torch.no_grad():
        # By name, because ranks must agree on the order even if they registered parameters in another one.
        for _, p in sorted(model.named_parameters()):
            if getattr(p, "_shared_params", False):
                dist.broadcast(p, src=source, group=process_group)


def allreduce_sequence_parallel_grad(model: nn.Module, process_group) -> None:
    """Sum the gradients of parameters marked `_sequence_parallel`, each rank having seen its own tokens only."""
    marked = [p for _, p in sorted(model.named_parameters()) if getattr(p, "_sequence_parallel", False)]
    grads = [p.grad for p in marked if p.grad is not None]
    with torch.no_grad():
        for dtype in sorted({g.dtype for g in grads}, key=str):
            alike = [g for g in grads if g.dtype == dtype]
            flat = torch.cat([g.flatten() for g in alike])
            dist.all_reduce(flat, group=process_group)
            for grad, total in zip(alike, flat.split([g.numel() for g in alike]), strict=True):
                grad.copy_(total.view_as(grad))


def get_dim_for_local_rank(dim: int, world_size: int, local_rank: int, multiple_of: int = 1) -> int:
    """The size of a rank's share of `dim` in units of `multiple_of`; the first ranks may have a unit more."""
    return share_of(dim, world_size, local_rank, multiple_of)


__all__ = [
    "AllGatherFunc",
    "AllReduceFunc",
    "ReduceScatterFunc",
    "all_gather",
    "all_gather_raw",
    "all_reduce",
    "all_reduce_raw",
    "allreduce_sequence_parallel_grad",
    "get_dim_for_local_rank",
    "reduce_scatter",
    "reduce_scatter_raw",
    "sync_shared_params",
]
