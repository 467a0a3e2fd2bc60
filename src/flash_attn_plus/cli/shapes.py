"""The tensors of a case without their contents, on PyTorch's meta device: what checks, choice and launches look at."""

import math
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn_plus.checks import check_arguments
from flash_attn_plus.errors import InvalidArgument
from flash_attn_plus.problem import AttentionInputs, AttentionProblem, describe
from flash_attn_plus.testing import Case

META = torch.device("meta")
_MOST_ELEMENTS = 1 << 56  # of a tensor: PyTorch counts its bytes in 63 bits


class Shapes(NamedTuple):
    """Inputs of a call, all of them on the meta device, and the numbers beside them."""

    inputs: AttentionInputs
    longest_q: int
    longest_k: int
    left: int
    right: int

    def problem(
        self, device: torch.device = META, is_backward: bool = False, is_deterministic: bool = False
    ) -> AttentionProblem:
        """What selection is asked for such a call on a device."""
        lengths = (self.longest_q, self.longest_k, self.left, self.right)
        return describe(self.inputs, *lengths, is_backward, is_deterministic)._replace(device=device)


def shapes_of(case: Case, dtype: torch.dtype) -> Shapes:
    """The call of a case; raises InvalidArgument with the engine's own sentence where it breaks the contract."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        if math.prod(shape) > _MOST_ELEMENTS:
            raise InvalidArgument(f"no tensor has the shape {shape}; give smaller sizes")
        return torch.empty(shape, dtype=dtype, device=META)

    def integers(*shape: int) -> Tensor:
        return empty(*shape, dtype=torch.int32)

    n, dim_v = case.sequences, case.head_dim_v or case.head_dim
    q = empty(*_lead(case.lengths_q, n, case.seqlen_q), case.heads, case.head_dim)
    lead, table = _lead(case.lengths_k, n, case.seqlen_k), None
    if case.page_size:
        blocks = -(-case.seqlen_k // case.page_size)
        lead, table = (n * blocks, case.page_size), integers(n, blocks)
    k, v = empty(*lead, case.heads_k, case.head_dim), empty(*lead, case.heads_k, dim_v)
    slopes = empty(*((n, case.heads) if case.alibi == "batch" else (case.heads,)), dtype=torch.float32)
    inputs = AttentionInputs(
        q, k, v, case.head_dim**-0.5 if case.softmax_scale is None else case.softmax_scale, case.softcap,
        case.dropout_p, None if case.lengths_q is None else integers(n + 1),
        None if case.lengths_k is None else integers(n + 1), None if case.used is None else integers(n),
        None if case.leftpad is None else integers(n), table, slopes if case.alibi else None,
        empty(2, dtype=torch.int64) if case.dropout_p else None,
    )  # fmt: skip
    check_arguments(inputs)
    longest_q, longest_k = (0 if x is None else max(x) + case.slack for x in (case.lengths_q, case.lengths_k))
    return Shapes(inputs, longest_q, longest_k, case.left, case.right)


def _lead(lengths: tuple[int, ...] | None, batch: int, seqlen: int) -> tuple[int, ...]:
    return (batch, seqlen) if lengths is None else (list(accumulate(lengths))[-1],)
