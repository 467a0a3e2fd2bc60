"""Block-sparse attention of the first version: the mask's conversion works, the attention itself is refused."""

import torch

_REPLACEMENT = (
    "block-sparse attention (blockmask) is not served by this package;"
    " use torch.nn.attention.flex_attention with a BlockMask, or flash_attn_varlen_func without a mask"
)


def convert_blockmask(blockmask, causal):
    """The 0/1 mask (rows of 16, columns of 256) as int32 (columns, rows): per column the set blocks, then -1.

    An entry is four times the row, plus 1 if the block is its row's first, plus 2 if it is its row's last.
    """
    assert not causal, "causal is not supported; put zeros above the diagonal of blockmask"
    blockmask = blockmask.bool()
    before = blockmask.cumsum(1)
    is_first = blockmask & (before == 1)
    is_last = blockmask & (before == before[:, -1:])
    rows = torch.arange(blockmask.shape[0], device=blockmask.device)[:, None]
    entries = 4 * rows + is_first.int() + 2 * is_last.int()
    order = (~blockmask).int().argsort(dim=0, stable=True)
    return torch.where(blockmask, entries, -1).gather(0, order).t().contiguous().to(torch.int32)


def flash_blocksparse_attn_func(
    qkv,
    cu_seqlens,
    blockmask,
    dropout_p,
    max_s,
    softmax_scale=None,
    causal=False,
    return_attn_probs=False,
    convert_mask=True,
):
    """Refused; the message names what to use."""
    raise NotImplementedError(_REPLACEMENT)


class FlashBlocksparseAttnFun:
    """Refused; the message names what to use."""

    @staticmethod
    def apply(*args):
        """Raise NotImplementedError."""
        raise NotImplementedError(_REPLACEMENT)


class FlashBlocksparseAttnFunWithS(FlashBlocksparseAttnFun):
    """Refused; the message names what to use."""
