"""Weights from and to `torch.nn.MultiheadAttention`."""

import torch
from torch import Tensor, nn

from flash_attn_plus import InvalidArgument


def _projections(module: nn.MultiheadAttention) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Weights and biases of q, k and v, as views."""
    if module.in_proj_weight is not None:
        weights: tuple[Tensor, ...] = module.in_proj_weight.chunk(3)
    else:
        weights = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
    return weights, () if module.in_proj_bias is None else module.in_proj_bias.chunk(3)


def from_torch(cls, module: nn.MultiheadAttention, causal: bool):
    """See `MultiHeadFlashAttention.from_torch`."""
    for name, is_set in (("add_bias_kv", module.bias_k is not None), ("add_zero_attn", module.add_zero_attn)):
        if is_set:
            raise InvalidArgument(f"module has {name}=True, which adds a key that this attention does not have")
    if module.kdim != module.vdim:
        raise InvalidArgument(
            f"module has kdim {module.kdim} and vdim {module.vdim}; keys and values share one context"
        )
    weight = module.out_proj.weight
    made = cls(
        module.embed_dim, module.num_heads, causal=causal, dropout=module.dropout,
        bias=module.in_proj_bias is not None, d_context=module.kdim, device=weight.device, dtype=weight.dtype,
    ).train(module.training)  # fmt: skip
    weights, biases = _projections(module)
    targets = made.q_proj, made.k_proj, made.v_proj
    with torch.no_grad():
        for target, weight in zip(targets, weights, strict=True):
            target.weight.copy_(weight)
        for target, bias in zip(targets, biases, strict=False):
            target.bias.copy_(bias)
        made.out_proj.load_state_dict(module.out_proj.state_dict())
    return made


def _check_convertible(module) -> None:
    inner = module.attention
    for name, is_set in (
        ("rotary_dim", module.rotary_dim > 0),
        ("window_size", inner.window_size != (-1, -1)),
        ("softcap", inner.softcap > 0.0),
        ("alibi_slopes", inner.alibi_slopes is not None),
        ("softmax_scale", inner.softmax_scale not in (None, module.head_dim**-0.5)),
    ):
        if is_set:
            raise InvalidArgument(f"{name} is set, which torch.nn.MultiheadAttention does not have; convert without it")


def to_torch(module) -> nn.MultiheadAttention:
    """See `MultiHeadFlashAttention.to_torch`."""
    _check_convertible(module)
    weight, group = module.out_proj.weight, module.num_heads // module.num_kv_heads
    made = nn.MultiheadAttention(
        module.d_model, module.num_heads, module.attention.dropout, module.out_proj.bias is not None,
        kdim=module.d_context, vdim=module.d_context, batch_first=True, device=weight.device, dtype=weight.dtype,
    ).train(module.training)  # fmt: skip

    def for_each_head(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, module.head_dim)).repeat_interleave(group, 0).flatten(0, 1)

    weights, biases = _projections(made)
    sources = module.q_proj, module.k_proj, module.v_proj
    with torch.no_grad():
        for source, weight in zip(sources, weights, strict=True):
            weight.copy_(source.weight if source is module.q_proj else for_each_head(source.weight))
        for source, bias in zip(sources, biases, strict=False):
            bias.copy_(source.bias if source is module.q_proj else for_each_head(source.bias))
        made.out_proj.load_state_dict(module.out_proj.state_dict())
    return made
