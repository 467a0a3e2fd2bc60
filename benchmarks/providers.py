"""The libraries that a results file compares, by the names it uses.

FACTORIES make fn(q, k, v, causal) on (b, s, h, d) tensors, PACKED fn(q, k, v, starts, longest) on packed causal
sequences, WINDOWED fn(q, k, v, left) on (b, s, h, d) tensors under a causal window.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, TypeVar

from torch import Tensor
from torch.nn.attention import SDPBackend

import flash_attn_plus
from flash_attn_plus import selection
from flash_attn_plus.backends import cuda_fa3, foreign
from flash_attn_plus.cli import providers
from flash_attn_plus.cli.providers import Dense as Attention
from flash_attn_plus.cli.providers import Packed

Windowed = Callable[[Tensor, Tensor, Tensor, int], Tensor]
Run = TypeVar("Run")


def serving(name: str) -> AbstractContextManager[None]:
    """Within the block, backward passes included, our backend of that name serves; nothing for other providers."""
    return flash_attn_plus.use_backend(name) if name in selection.NAMES else nullcontext()


def _fa3(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, **options: Any) -> Tensor:
    """FlashAttention-3's operator on packed sequences, without splits of the keys."""
    if q.requires_grad:
        raise NotImplementedError("forward passes only")
    given = {"q": q, "k": k, "v": v, "softmax_scale": q.shape[-1] ** -0.5, "num_splits": 1}
    given |= {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": longest, "max_seqlen_k": longest}
    given |= {"is_causal": False, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0} | options
    return cuda_fa3.PROBE.value(**cuda_fa3.arguments(cuda_fa3.PROBE.value._schema, given))[0]


_even_starts = cache(foreign.even_starts)  # else a kernel of ours would count as FlashAttention-3's


def _fa3_dense(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    starts = _even_starts(q.shape[0], q.shape[1], q.device)
    return _fa3(*(x.flatten(0, 1) for x in (q, k, v)), starts, q.shape[1], **options).view(q.shape)


def _with_fa3(run: Run) -> Run:
    if cuda_fa3.PROBE.failure is not None:
        raise ImportError(cuda_fa3.PROBE.failure)
    return run


def _fa4_window(q: Tensor, k: Tensor, v: Tensor, left: int) -> Tensor:
    from flash_attn.cute import flash_attn_func

    return providers.first(flash_attn_func(q, k, v, causal=True, window_size=(left, 0)))


def _with_fa4(run: Run) -> Run:
    providers.flash_attn_4()
    return run


def _window(q: Tensor, k: Tensor, v: Tensor, left: int) -> Tensor:
    return flash_attn_plus.attention(q, k, v, causal=True, window_size=(left, 0))


FACTORIES: dict[str, Callable[[], Attention]] = {
    "triton": lambda: providers.dense,
    "gluon": lambda: providers.dense,
    "FA2 (SDPA)": lambda: providers.sdpa(SDPBackend.FLASH_ATTENTION).dense,
    "cuDNN (SDPA)": lambda: providers.sdpa(SDPBackend.CUDNN_ATTENTION).dense,
    "FlexAttention": lambda: providers.flex().dense,
    "FlagGems": lambda: providers.flaggems().dense,
    "FA3": lambda: _with_fa3(lambda q, k, v, causal: _fa3_dense(q, k, v, is_causal=causal)),
    "FA4": lambda: providers.flash_attn_4().dense,
}
PACKED: dict[str, Callable[[], Packed]] = {
    "triton": lambda: providers.ours("triton").packed,
    "gluon": lambda: providers.ours("gluon").packed,
    "FA3": lambda: _with_fa3(lambda *packed: _fa3(*packed, is_causal=True)),
    "FA4": lambda: providers.flash_attn_4().packed,
}
WINDOWED: dict[str, Callable[[], Windowed]] = {
    "triton": lambda: _window,
    "gluon": lambda: _window,
    "FA3": lambda: _with_fa3(
        lambda q, k, v, left: _fa3_dense(q, k, v, window_size_left=left, window_size_right=0)
    ),
    "FA4": lambda: _with_fa4(_fa4_window),
}  # fmt: skip


def available(names: list[str], factories: dict[str, Callable[[], Run]]) -> dict[str, Run]:
    """Those of the providers in a table that can be had here; the others are told."""
    found = {}
    for name in names:
        if name not in factories:
            continue
        try:
            found[name] = factories[name]()
        except ImportError as error:
            print(f"{name}: not here ({error})", flush=True)
    return found
