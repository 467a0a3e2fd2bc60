"""The lists of visible tiles that the portable kernels walk under a block mask, made on the device for each launch."""

import torch
import triton
from torch import Tensor

from flash_attn_plus.kernels.features import Features
from flash_attn_plus.kernels.triton import block_lists
from flash_attn_plus.kernels.triton.block_lists import Blocks
from flash_attn_plus.problem import AttentionInputs, AttentionProblem
from flash_attn_plus.tuning import block_sparse
from flash_attn_plus.tuning.config import TileConfig

_LONGEST_CHUNK = 512  # entries of a list that are decided at a time


def _are_cut(config: TileConfig, block_size: tuple[int, int]) -> bool:
    return bool(block_size[0] % config.block_m or block_size[1] % config.block_n)


def _leading_strides(x: Tensor) -> tuple[int, int]:
    """Those of batch and heads; 0 where all share one."""
    return x.stride(0) if x.shape[0] > 1 else 0, x.stride(1) if x.shape[1] > 1 else 0


def prepare(
    problem: AttentionProblem, inputs: AttentionInputs, features: Features, config: TileConfig, is_by_keys: bool
) -> tuple[TileConfig, Features, Blocks | None]:
    """Tiles, switches and lists of a launch: lists of query tiles for each tile of keys (is_by_keys), or the reverse.

    Without a block mask all is as it was, and there are no lists. Nothing waits for the device.
    """
    if inputs.block_mask is None:
        return config, features, None
    p, mask = problem, inputs.block_mask.view(torch.uint8)
    c = block_sparse.fitted(config, inputs.block_size)
    features = features._replace(has_blocks=True, has_cut_blocks=_are_cut(c, inputs.block_size))
    # Lengths of sequences decide which tiles the band and the sequence's end cut.
    batch = p.batch if p.is_varlen_q or p.is_varlen_k else mask.shape[0]
    heads = mask.shape[1]
    tiles, others = -(-p.seqlen_q // c.block_m), -(-p.seqlen_k // c.block_n)
    if is_by_keys:
        tiles, others = others, tiles
    lists = torch.empty((batch, heads, tiles, others + 3), dtype=torch.int32, device=mask.device)
    mask_strides = (*_leading_strides(mask), mask.stride(2))
    block_lists.attention_lists_kernel[(batch * heads * tiles,)](
        lists, mask, inputs.cu_seqlens_q, inputs.cu_seqlens_k, *mask_strides, *inputs.block_size,
        p.seqlen_q, p.seqlen_k, p.left, p.right, heads, tiles, others,
        c.block_m, c.block_n, features, is_by_keys, min(_LONGEST_CHUNK, triton.next_power_of_2(others)), num_warps=1,
    )  # fmt: skip
    return c, features, Blocks(lists, *_leading_strides(lists), others + 3, mask, *mask_strides, *inputs.block_size)
