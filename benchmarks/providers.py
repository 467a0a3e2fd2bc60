"""Attention libraries under one calling convention: fn(q, k, v, causal) on (batch, seqlen, heads, head_dim) tensors."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_attn_plus
from flash_attn_plus import selection

Attention = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def ours(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The engine; `serving` decides by which backend."""
    return flash_attn_plus.attention(q, k, v, causal=causal)


def serving(name: str) -> AbstractContextManager[None]:
    """Within the block, backward passes included, our backend of that name serves; nothing for other providers."""
    return flash_attn_plus.use_backend(name) if name in selection.NAMES else nullcontext()


def sdpa(backend: SDPBackend) -> Attention:
    """PyTorch's scaled_dot_product_attention by one of its backends."""

    def run(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        with sdpa_kernel(backend):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            grouped = q.shape[1] != k.shape[1]
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
        return out.transpose(1, 2)

    return run


def flex() -> Attention:
    """PyTorch's FlexAttention, compiled, with a block mask for causal calls."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.config.cache_size_limit = 64
    compiled, masks = torch.compile(flex_attention, dynamic=False), {}

    def run(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        lengths = (q.shape[2], k.shape[2])
        if causal and lengths not in masks:
            masks[lengths] = create_block_mask(lambda b, h, i, j: i >= j, None, None, *lengths, device=q.device)
        mask = masks[lengths] if causal else None
        return compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    return run


def flaggems() -> Attention:
    """FlagGems' forward operator."""
    from flag_gems.ops.attention import flash_attention_forward

    def run(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        if q.requires_grad:
            raise NotImplementedError("its backward refuses these calls")
        sizes, scale = (q.shape[1], k.shape[1]), q.shape[-1] ** -0.5
        return flash_attention_forward(q, k, v, None, None, *sizes, 0.0, causal, False, scale=scale)[0]

    return run


FACTORIES: dict[str, Callable[[], Attention]] = {
    "triton": lambda: ours,
    "gluon": lambda: ours,
    "FA2 (SDPA)": lambda: sdpa(SDPBackend.FLASH_ATTENTION),
    "cuDNN (SDPA)": lambda: sdpa(SDPBackend.CUDNN_ATTENTION),
    "FlexAttention": flex,
    "FlagGems": flaggems,
}


def available(names: list[str]) -> dict[str, Attention]:
    """The providers that can be had here; the others are told."""
    found = {}
    for name in names:
        try:
            found[name] = FACTORIES[name]()
        except ImportError as error:
            print(f"{name}: not here ({error})", flush=True)
    return found
