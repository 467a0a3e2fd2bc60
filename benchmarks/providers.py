"""The libraries that a results file compares, by the names it uses: fn(q, k, v, causal) on (b, s, h, d) tensors."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch.nn.attention import SDPBackend

import flash_attn_plus
from flash_attn_plus import selection
from flash_attn_plus.cli import providers
from flash_attn_plus.cli.providers import Dense as Attention


def serving(name: str) -> AbstractContextManager[None]:
    """Within the block, backward passes included, our backend of that name serves; nothing for other providers."""
    return flash_attn_plus.use_backend(name) if name in selection.NAMES else nullcontext()


FACTORIES: dict[str, Callable[[], Attention]] = {
    "triton": lambda: providers.dense,
    "gluon": lambda: providers.dense,
    "FA2 (SDPA)": lambda: providers.sdpa(SDPBackend.FLASH_ATTENTION).dense,
    "cuDNN (SDPA)": lambda: providers.sdpa(SDPBackend.CUDNN_ATTENTION).dense,
    "FlexAttention": lambda: providers.flex().dense,
    "FlagGems": lambda: providers.flaggems().dense,
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
