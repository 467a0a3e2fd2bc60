"""Appends to a key/value cache, as samples that `warmup` compiles."""

from typing import NamedTuple

import torch

from flash_attn_plus import cache_append, ops, selection
from flash_attn_plus.cache_checks import CacheCall
from flash_attn_plus.cli.shapes import META, shapes_of
from flash_attn_plus.testing import Case


class AppendSample(NamedTuple):
    """One new token a sequence of a decode case, its keys and the queries turned by all of the head dim or not."""

    case: Case
    dtype: torch.dtype
    is_rotary: bool

    def launch(self) -> None:
        """Prepare and launch the append, as calls with many and with few such tensors would."""
        shapes = shapes_of(self.case, self.dtype)
        x, n = shapes.inputs, self.case.sequences
        new_k, new_v = (torch.empty((n, 1, *c.shape[-2:]), dtype=self.dtype, device=META) for c in (x.k, x.v))
        angles = (self.case.seqlen_k, self.case.head_dim // 2)
        table = torch.empty(angles, dtype=self.dtype, device=META) if self.is_rotary else None
        call = CacheCall(
            x.q, x.k, x.v, new_k, new_v, table, table, x.seqused_k, None, None, x.block_table, None, None, None,
            x.softmax_scale, shapes.left, shapes.right, x.softcap, False, 0,
        )  # fmt: skip
        cache_append.TritonAppend(x.q)(call, x.block_table)
        if self.is_rotary:
            return
        attend = selection.get("triton").plan_forward(shapes.problem(), x)
        if getattr(attend, "most_new", 0):  # then it appends a few keys itself
            attend(x, *ops.allocate_outputs(x.q, x.v, False), (new_k, new_v))

    def place(self) -> tuple[str, str]:
        """(form, where it is first needed), for people."""
        return "append", f"b={self.case.sequences} sk={self.case.seqlen_k}" + (" rotary" if self.is_rotary else "")
