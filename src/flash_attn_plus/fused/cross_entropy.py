"""Cross-entropy of logits (n, vocabulary) with smoothing, scale, z-loss and a vocabulary split over processes."""

from functools import cache
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from flash_attn_plus.derivatives import once_differentiable
from flash_attn_plus.fused import cross_entropy_torch, launch
from flash_attn_plus.fused.collective import all_gather
from flash_attn_plus.fused.path import is_direct, on_device, uses_triton

_NUMBERS = (
    "float smoothing, float scale, float lse_square_scale, int ignore_index, SymInt class_start, SymInt total_classes"
)
_library = torch.library.Library("flash_attn_plus", "FRAGMENT")
_library.define(
    f"cross_entropy_forward(Tensor logits, Tensor labels, Tensor? precomputed_lse, {_NUMBERS}, bool is_split)"
    " -> (Tensor losses, Tensor lse, Tensor z_losses)"
)
_library.define(
    f"cross_entropy_backward(Tensor dlosses, Tensor logits, Tensor lse, Tensor labels, {_NUMBERS}) -> Tensor dlogits"
)
_library.define(
    f"cross_entropy_backward_(Tensor dlosses, Tensor(a!) logits, Tensor lse, Tensor labels, {_NUMBERS}) -> ()"
)


def _row_results(logits: Tensor) -> Tensor:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return torch.empty(logits.shape[0], dtype=dtype, device=logits.device)


def _vector_width(x: Tensor) -> int:
    """Elements of a 16-byte load, or 1 where the tensor starts at no such boundary."""
    return 16 // x.element_size() if x.data_ptr() % 16 == 0 else 1


@cache
def _modules() -> tuple[ModuleType, ModuleType]:
    """Triton's, which need not be installed: the launcher and the kernels."""
    from flash_attn_plus.backends import triton_relaunch
    from flash_attn_plus.kernels.triton import cross_entropy

    return triton_relaunch, cross_entropy


def _forward_triton(
    logits, labels, precomputed_lse, smoothing, scale, lse_square_scale, ignore_index, class_start, total_classes,
    is_split, losses, lse, z_losses,
) -> None:  # fmt: skip
    triton, kernels = _modules()
    rows, cols = logits.shape
    block, num_warps = launch.cross_entropy_block(cols)
    width = _vector_width(logits)
    tensors = (losses, lse, z_losses, logits, labels, precomputed_lse)
    numbers = (smoothing, scale, lse_square_scale, ignore_index, class_start, total_classes)
    constants = (cols, logits.stride(0), is_split, smoothing > 0.0, block // width, width)
    with on_device(logits):
        triton.launch(kernels.cross_entropy_fwd_kernel, (rows,), tensors, numbers, constants, num_warps, logits.device)


def _backward_triton(
    dlosses, logits, lse, labels, smoothing, scale, lse_square_scale, ignore_index, class_start, total_classes, dlogits
) -> None:
    triton, kernels = _modules()
    rows, cols = logits.shape
    block, num_warps = launch.elementwise_block(cols)
    width = min(_vector_width(logits), _vector_width(dlogits))
    if (logits.stride(0) - dlogits.stride(0)) % width != 0:
        width = 1
    tensors, grid = (dlogits, dlosses, logits, lse, labels), (rows * -(-cols // block),)
    numbers = (smoothing, scale, lse_square_scale, ignore_index, class_start, total_classes, dlosses.stride(0))
    constants = (cols, logits.stride(0), dlogits.stride(0), block // width, width)
    with on_device(logits):
        triton.launch(kernels.cross_entropy_bwd_kernel, grid, tensors, numbers, constants, num_warps, logits.device)


def _forward(logits, labels, precomputed_lse, *numbers):
    losses, lse, z_losses = (_row_results(logits) for _ in range(3))
    if logits.shape[0] > 0:
        run = _forward_triton if uses_triton(logits) else cross_entropy_torch.forward
        run(logits, labels, precomputed_lse, *numbers, losses, lse, z_losses)
    return losses, lse, z_losses


def _run_backward(dlosses, logits, lse, labels, *numbers_and_dlogits) -> None:
    if logits.numel() > 0:
        run = _backward_triton if uses_triton(logits) else cross_entropy_torch.backward
        run(dlosses, logits, lse, labels, *numbers_and_dlogits)


def _backward(dlosses, logits, lse, labels, *numbers) -> Tensor:
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _run_backward(dlosses, logits, lse, labels, *numbers, dlogits)
    return dlogits


def _backward_inplace(dlosses, logits, lse, labels, *numbers) -> None:
    _run_backward(dlosses, logits, lse, labels, *numbers, logits)


for _name, _implementation, _fake in (
    ("cross_entropy_forward", _forward, lambda logits, *_: tuple(_row_results(logits) for _ in range(3))),
    ("cross_entropy_backward", _backward, lambda dlosses, logits, *_: logits.new_empty(logits.shape)),
    ("cross_entropy_backward_", _backward_inplace, lambda *_: None),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flash_attn_plus::{_name}", _fake, lib=_library)


def _merge_split(losses, lse, labels, numbers, process_group) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, logsumexp and z-losses over the whole vocabulary from every rank's part of it."""
    smoothing, _, lse_square_scale, ignore_index, _, total_classes = numbers
    every_lse = all_gather(lse, process_group).view(-1, lse.shape[0])
    work = dist.all_reduce(losses, op=dist.ReduceOp.SUM, group=process_group, async_op=True)
    lse = torch.logsumexp(every_lse, dim=0)
    work.wait()
    is_counted = labels != ignore_index
    is_class = is_counted & (labels >= 0) & (labels < total_classes)
    z_losses = torch.where(is_counted, lse_square_scale * lse.square(), 0.0)
    losses = losses + lse * torch.where(is_class, 1.0, smoothing) + z_losses
    return torch.where(is_counted, losses, 0.0), lse, z_losses


class CrossEntropyFunction(torch.autograd.Function):
    """(losses, z_losses), float32 (n,); differentiable in logits through losses."""

    @staticmethod
    def forward(
        ctx, logits, labels, precomputed_lse=None, smoothing=0.0, logit_scale=1.0, lse_square_scale=0.0,
        ignore_index=-100, inplace_backward=False, process_group=None,
    ):  # fmt: skip
        if logits.stride(-1) != 1:
            logits = logits.contiguous()
        labels = labels.contiguous()
        if logit_scale != 1.0 or smoothing != 0.0:
            precomputed_lse = None  # it says nothing about scaled logits or their sum
        elif precomputed_lse is not None:
            precomputed_lse = precomputed_lse.contiguous()
        world_size = 1 if process_group is None else dist.get_world_size(process_group)
        class_start = 0 if process_group is None else dist.get_rank(process_group) * logits.shape[1]
        numbers = (
            float(smoothing), float(logit_scale), float(lse_square_scale), ignore_index, class_start,
            world_size * logits.shape[1],
        )  # fmt: skip
        run = _forward if is_direct(logits, labels) else torch.ops.flash_attn_plus.cross_entropy_forward
        losses, lse, z_losses = run(logits, labels, precomputed_lse, *numbers, world_size > 1)
        if world_size > 1:
            losses, lse, z_losses = _merge_split(losses, lse, labels, numbers, process_group)
        ctx.save_for_backward(logits, lse, labels)
        ctx.mark_non_differentiable(z_losses)
        ctx.numbers, ctx.inplace_backward = numbers, inplace_backward
        return losses, z_losses

    @staticmethod
    @once_differentiable
    def backward(ctx, dlosses, _dz_losses):
        logits, lse, labels = ctx.saved_tensors
        arguments = (dlosses, logits, lse, labels, *ctx.numbers)
        if ctx.inplace_backward:
            torch.ops.flash_attn_plus.cross_entropy_backward_(*arguments)  # it tells autograd of the change
            dlogits = logits
        else:
            run = _backward if is_direct(*arguments[:4]) else torch.ops.flash_attn_plus.cross_entropy_backward
            dlogits = run(*arguments)
        return dlogits, *[None] * 8


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy per row, with the z-loss in it, and the z-loss alone.

    Args:
        logits: (n, vocabulary), any float dtype; with `process_group` this rank's equal share of the vocabulary.
        labels: (n,) integer class ids, global ones with `process_group`. One outside the vocabulary gives no
            cross-entropy, only the smoothing part and the z-loss; `ignore_index` gives loss and gradient 0.
        precomputed_lse: (n,) logsumexp of the logits (of this rank's share), used when neither scale nor smoothing is.
        label_smoothing: share of the target spread evenly over all classes.
        logit_scale: positive factor on the logits.
        lse_square_scale: weight of the z-loss, the square of the logsumexp.
        inplace_backward: the gradient overwrites the logits.

    Returns:
        losses and z_losses, float32 (n,) (float64 for float64 logits); only losses is differentiable.
    """
    assert logit_scale > 0.0, "logit_scale must be positive"
    assert logits.ndim == 2, (
        f"logits must have shape (n, vocabulary), not {tuple(logits.shape)}; flatten what is before"
    )
    assert labels.shape == logits.shape[:1], "labels must have shape (n,) for logits of shape (n, vocabulary)"
    assert logits.is_floating_point(), f"logits must be floating-point numbers, not {logits.dtype}"
    assert not labels.is_floating_point(), f"labels must be integer class ids, not {labels.dtype}"
    assert precomputed_lse is None or precomputed_lse.shape == labels.shape, "precomputed_lse must have shape (n,)"
    return CrossEntropyFunction.apply(
        logits, labels, precomputed_lse, label_smoothing, logit_scale, lse_square_scale, ignore_index,
        inplace_backward, process_group,
    )  # fmt: skip
