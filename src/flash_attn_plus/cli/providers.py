"""Attention libraries under one calling convention, as far as each is installed.

Tensors are (batch, seqlen, heads, head_dim); packed ones (total, heads, head_dim) with int32 starts. What a library
does not offer is None in its `Provider`; what it does not serve, it says by an exception when it is called.
"""

import importlib
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_attn_plus
from flash_attn_plus import selection
from flash_attn_plus.problem import AttentionProblem

Dense = Callable[[Tensor, Tensor, Tensor, bool], Tensor]  # q, k, v, causal
Packed = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]  # q, k, v, cu_seqlens, longest; causal
Decode = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # q of one token, caches, lengths


class Provider(NamedTuple):
    """One library's calls; `backend` is ours that must serve them, if it is us."""

    dense: Dense | None = None
    packed: Packed | None = None
    decode: Decode | None = None
    backend: str | None = None

    def serving(self) -> AbstractContextManager[None]:
        """Within the block our backend of that name serves, backward passes included; nothing for other libraries."""
        return flash_attn_plus.use_backend(self.backend) if self.backend else nullcontext()


def first(result: Any) -> Tensor:
    """The output of a call that may return more."""
    return result[0] if isinstance(result, tuple) else result


def ours(backend: str) -> Provider:
    """The engine, by one backend."""

    def packed(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int) -> Tensor:
        lengths: dict[str, Any] = {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
        lengths |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
        return first(flash_attn_plus.attention(q, k, v, causal=True, **lengths))

    def decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        return first(flash_attn_plus.attention_with_kvcache(q, k, v, cache_seqlens=lengths))

    return Provider(dense, packed, decode, backend)


def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The engine, by whatever backend is chosen."""
    return first(flash_attn_plus.attention(q, k, v, causal=causal))


def sdpa(backend: SDPBackend | None) -> Provider:
    """PyTorch's scaled_dot_product_attention by one of its backends, or by its own choice."""

    def call(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            grouped = q.shape[1] != k.shape[1]
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=grouped, **options)
        return out.transpose(1, 2)

    def run(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return call(q, k, v, is_causal=causal)

    def packed(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, _longest: int) -> Tensor:
        starts = cu.tolist()
        spans = [slice(*pair) for pair in pairwise(starts)]
        return torch.cat([call(*(x[s][None] for x in (q, k, v)), is_causal=True)[0] for s in spans])

    def decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        is_filled = torch.arange(k.shape[1], device=k.device) < lengths[:, None]
        return call(q, k, v, attn_mask=is_filled[:, None, None])

    return Provider(run, packed, decode)


def flex() -> Provider:
    """PyTorch's FlexAttention, compiled, with a block mask for causal calls."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.config.cache_size_limit = 64
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    masks: dict[tuple[int, int], Any] = {}

    def run(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        lengths = (q.shape[2], k.shape[2])
        if causal and lengths not in masks:
            masks[lengths] = create_block_mask(lambda b, h, i, j: i >= j, None, None, *lengths, device=q.device)
        mask = masks[lengths] if causal else None
        return compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    return Provider(run)


def flaggems() -> Provider:
    """FlagGems' forward operator."""
    flash_attention_forward = importlib.import_module("flag_gems.ops.attention").flash_attention_forward

    def run(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        if q.requires_grad:
            raise NotImplementedError("its backward refuses these calls")
        sizes, scale = (q.shape[1], k.shape[1]), q.shape[-1] ** -0.5
        return flash_attention_forward(q, k, v, None, None, *sizes, 0.0, causal, False, scale=scale)[0]

    return Provider(run)


def _interface(module: Any) -> Provider:
    """A library with the functions and parameter names of flash_attn."""

    def run(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return first(module.flash_attn_func(q, k, v, causal=causal))

    def packed(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int) -> Tensor:
        lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest}
        return first(module.flash_attn_varlen_func(q, k, v, causal=True, **lengths))

    def decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        return first(module.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths))

    has_cache = hasattr(module, "flash_attn_with_kvcache")
    return Provider(run, packed, decode if has_cache else None)


def flash_attn_2() -> Provider:
    """The original flash_attn; not our drop-in, which bears the same name."""
    extension = importlib.util.find_spec("flash_attn_2_cuda")
    if extension is None or (extension.origin or "").endswith(".py"):
        raise ImportError("the original flash_attn with its CUDA extension is not installed")
    return _interface(importlib.import_module("flash_attn"))


def flash_attn_3() -> Provider:
    """FlashAttention-3, as its own repository installs it."""
    return _interface(importlib.import_module("flash_attn_interface"))


def flash_attn_4() -> Provider:
    """FlashAttention-4."""
    return _interface(importlib.import_module("flash_attn.cute"))


def xformers() -> Provider:
    """xFormers' memory-efficient attention."""
    operators = importlib.import_module("xformers.ops")
    biases = importlib.import_module("xformers.ops.fmha.attn_bias")

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Any) -> Tensor:
        group = q.shape[2] // k.shape[2]
        if group == 1:
            return operators.memory_efficient_attention(q, k, v, attn_bias=bias)
        q = q.unflatten(2, (k.shape[2], group))
        k, v = (x[:, :, :, None].expand(-1, -1, -1, group, -1) for x in (k, v))
        return operators.memory_efficient_attention(q, k, v, attn_bias=bias).flatten(2, 3)

    def run(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return call(q, k, v, biases.LowerTriangularMask() if causal else None)

    def packed(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, _longest: int) -> Tensor:
        bias = biases.BlockDiagonalCausalMask.from_seqlens(cu.diff().tolist())
        return call(q[None], k[None], v[None], bias)[0]

    return Provider(run, packed)


PEERS: dict[str, Callable[[], Provider]] = {
    "SDPA": lambda: sdpa(None),
    "SDPA flash": lambda: sdpa(SDPBackend.FLASH_ATTENTION),
    "SDPA cuDNN": lambda: sdpa(SDPBackend.CUDNN_ATTENTION),
    "SDPA efficient": lambda: sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "FlexAttention": flex,
    "flash-attn 2": flash_attn_2,
    "flash-attn 3": flash_attn_3,
    "flash-attn 4": flash_attn_4,
    "FlagGems": flaggems,
    "xFormers": xformers,
}
ON_CPU = ("SDPA", "FlexAttention")  # the others' kernels are for GPUs


def label(backend: str) -> str:
    """How our backend is called beside others."""
    return f"ours: {backend}"


def available(
    where: torch.device, dtype: torch.dtype, asked: list[str] | None = None
) -> tuple[dict[str, Provider], dict[str, str]]:
    """The providers that can be had on a device in a dtype, ours first, and why the others cannot."""
    found: dict[str, Provider] = {}
    absent: dict[str, str] = {}
    typical = AttentionProblem(where, dtype, 1, 1024, 1024, 8, 8, 64, 64)
    for backend in selection.NAMES:
        reasons = selection.get(backend).reasons(typical)
        if reasons:
            absent[label(backend)] = "; ".join(reasons)
        else:
            found[label(backend)] = ours(backend)
    for name, make in PEERS.items():
        if asked is not None and name not in asked:
            continue
        if where.type == "cpu" and name not in ON_CPU:
            absent[name] = "runs on GPUs only"
            continue
        try:
            found[name] = make()
        except (ImportError, RuntimeError, AttributeError, OSError, TypeError) as error:
            absent[name] = f"not installed, or not usable: {error}"
    if asked is not None:
        found = {name: provider for name, provider in found.items() if name in asked}
        absent = {name: why for name, why in absent.items() if name in asked}
    return found, absent
