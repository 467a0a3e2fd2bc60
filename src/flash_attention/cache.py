"""Keys and values of the tokens that generation has seen."""

from typing import Any, cast

import torch
from torch import Tensor

from flash_attn_plus import InvalidArgument, attention_with_kvcache


class KeyValueCache:
    """Room for `max_seqlen` keys and values of each of `batch_size` sequences, and how many are in use.

    Attributes:
        k, v: (batch_size, max_seqlen, heads_k, head_dim).
        lengths: int32 (batch_size,), tokens held of each sequence, on the device.
        bound: at least the longest of `lengths`, known without asking the device.
    """

    def __init__(
        self,
        batch_size: int,
        max_seqlen: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        shape = (batch_size, max_seqlen, num_kv_heads, head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.bound = 0

    def reset(self) -> None:
        """Forget every token; the memory is kept."""
        self.lengths.zero_()
        self.bound = 0

    def reorder(self, indices: Tensor) -> None:
        """Let sequence n continue sequence indices[n], int64 (batch_size,), as beam search does."""
        self.k, self.v, self.lengths = (x.index_select(0, indices) for x in (self.k, self.v, self.lengths))

    def check_room(self, batch_size: int, tokens: int) -> None:
        """Raise InvalidArgument unless that many tokens of that many sequences can be added."""
        if batch_size != self.k.shape[0]:
            raise InvalidArgument(f"cache holds {self.k.shape[0]} sequences, not {batch_size}; make one for this batch")
        if self.bound + tokens > self.k.shape[1]:
            raise InvalidArgument(
                f"cache has room for {self.k.shape[1]} tokens a sequence, not for {tokens} behind the {self.bound} that"
                " were added; make one with a larger max_seqlen"
            )

    def positions(self, tokens: int) -> Tensor:
        """int64 (batch_size, tokens): where the next tokens stand."""
        return self.lengths.long()[:, None] + torch.arange(tokens, device=self.lengths.device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, taken: Tensor | int, **options: Any) -> Tensor:
        """Add k and v, (b, s, hk, d), and let each of q, (b, s, h, d), see the tokens that are not behind it.

        Only the first `taken` of the s tokens (an int or int32 (b,)) stay; the next call writes over the others.
        """
        rows = (x.to(self.k.dtype) for x in (k, v))
        out = attention_with_kvcache(
            q.to(self.k.dtype), self.k, self.v, *rows, cache_seqlens=self.lengths, causal=True, **options
        )
        self.lengths.add_(taken)
        self.bound += k.shape[1]
        return cast("Tensor", out).to(q.dtype)
