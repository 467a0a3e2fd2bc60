"""The attention module."""

from typing import Any

import torch
from torch import Tensor, nn

from flash_attention.functional import flash_attention, window_bounds
from flash_attention.ragged import Sequences
from flash_attn_plus import InvalidArgument


class FlashAttention(nn.Module):
    """softmax(q k^T) v without parameters; `flash_attention` describes inputs and options.

    Args:
        causal, softmax_scale, window_size, softcap, deterministic: see `flash_attention`.
        dropout: in training, the probability to drop an attention weight, in [0, 1).
        alibi_slopes: (h,) or (b, h); kept in float32 whatever the module is converted to, and not in the state_dict.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        dropout: float = 0.0,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise InvalidArgument(f"dropout must be in [0, 1), not {dropout}; pass a probability below 1")
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.dropout = dropout
        self.window_size = window_bounds(window_size)
        self.softcap = softcap
        self.deterministic = deterministic
        slopes = None if alibi_slopes is None else torch.as_tensor(alibi_slopes, dtype=torch.float32).detach()
        self.register_buffer("alibi_slopes", slopes, persistent=False)

    def _apply(self, fn, recurse=True):
        slopes = self.alibi_slopes  # `half` would round them, and `to_empty` forget them
        super()._apply(fn, recurse)
        if slopes is not None and not slopes.is_meta:
            self.alibi_slopes = slopes.to(self.alibi_slopes.device)
        return self

    def score_options(self) -> dict[str, Any]:
        """What decides the attention weights, as arguments of `flash_attention` and `attention_map`."""
        return {
            "causal": self.causal,
            "softmax_scale": self.softmax_scale,
            "window_size": self.window_size,
            "softcap": self.softcap,
            "alibi_slopes": self.alibi_slopes,
        }

    def forward(
        self,
        q: Tensor | Sequences,
        k: Tensor | Sequences,
        v: Tensor | Sequences,
        key_padding_mask: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        """Attention of q (b, h, sq, d), k (b, hk, sk, d) and v (b, hk, sk, dv), or of lists or nested tensors.

        `key_padding_mask`, bool (b, sk), is True where a token takes part, False where it is padding. Returns what
        `flash_attention` returns, and raises what it raises.
        """
        dropout_p = self.dropout if self.training else 0.0
        return flash_attention(
            q, k, v, key_padding_mask, dropout_p=dropout_p, deterministic=self.deterministic, return_lse=return_lse,
            **self.score_options(),
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The options that are not at their defaults."""
        slopes = None if self.alibi_slopes is None else tuple(self.alibi_slopes.shape)
        shown = {**self.score_options(), "alibi_slopes": slopes, "dropout": self.dropout}
        return ", ".join(f"{name}={value}" for name, value in shown.items() if value not in (None, 0.0, (-1, -1)))
