"""Arguments and grid of the Hopper forward kernel."""

from torch import Tensor

from flash_attn_plus import device
from flash_attn_plus.backends.gluon_tiles import (
    QUERIES,
    Launch,
    chunk_of,
    counter,
    rows_between,
    score_numbers,
    tiles_of,
)
from flash_attn_plus.kernels.gluon import forward as forward_kernels
from flash_attn_plus.problem import AttentionInputs, AttentionProblem
from flash_attn_plus.tuning import hopper


class ForwardPlan:
    """The forward kernel for calls that differ in their tensors' contents only.

    As many programs as processors each take tiles of queries until none is left.
    """

    def __init__(self, problem: AttentionProblem, inputs: AttentionInputs):
        p, x = problem, inputs
        width = hopper.padded_head_dim(p.head_dim)
        tile = hopper.forward_tile(p, x.q.shape[0] / p.batch if p.is_varlen_q else None)
        tiles = p.batch * p.heads * -(-p.seqlen_q // (QUERIES * tile.consumers))
        is_cache = p.has_seqused_k or p.has_leftpad_k or p.page_size > 0
        self._is_even = p.right < 0 and not (p.is_varlen_q or p.is_varlen_k or is_cache)
        self._device, self._width = p.device, width
        boxes = (
            tiles_of(x.q, QUERIES, width),
            tiles_of(x.k, tile.block_n, width, is_cache),
            tiles_of(x.v, tile.block_n, width, is_cache),
        )
        self._tiles = tuple(tiles.of(None) for tiles in boxes)  # plans outlive the tensors of their first call
        chunk = chunk_of(p.batch * p.heads, p.seqlen_k * width * 4, p.right >= 0, hopper.forward_cache(p, tile))
        self._sizes = (p.batch, p.heads, p.heads // p.heads_k, chunk, p.seqlen_q, p.seqlen_k, p.left, p.right)
        constants = {
            "HAS_LEFT": p.left >= 0,
            "HAS_RIGHT": p.right >= 0,
            "HAS_SOFTCAP": p.has_softcap,
            "PAGE": p.page_size,
            "CONSUMERS": tile.consumers,
            "Q_TILES": tile.query_tiles,
            "K_STAGES": tile.key_stages,
            "V_STAGES": tile.value_stages,
            "HAS_TURNS": tile.has_turns,
            "FREES_EARLY": tile.frees_early,
            "CONSUMER_REGISTERS": tile.consumer_registers,
            "PRODUCER_REGISTERS": tile.producer_registers,
        }
        self._numbers = (
            rows_between(x.k) if is_cache else 0, x.block_table.stride(0) if x.block_table is not None else 0,
            *score_numbers(p, x),
        )  # fmt: skip
        optional = (p.has_seqused_k, p.has_leftpad_k, p.has_alibi, x.cu_seqlens_k is None)
        key = (p.dtype, width, tile.block_n, p.is_varlen_q, p.is_varlen_k, self._is_even, *optional)
        grid = min(tiles, device.probe(p.device).processors)
        self._launch = Launch(forward_kernels.attention_forward_kernel, p.device, grid, key, constants)

    def __call__(self, inputs: AttentionInputs, out: Tensor, lse: Tensor) -> None:
        """Fill out and lse."""
        x, (q, k, v) = inputs, self._tiles
        self._launch(
            q.of(x.q), k.of(x.k), v.of(x.v), tiles_of(out, QUERIES, self._width), lse, x.cu_seqlens_q, x.cu_seqlens_k,
            None if self._is_even else counter(self._device), x.seqused_k, x.leftpad_k, x.block_table, x.alibi_slopes,
            *self._sizes, lse.shape[-1], *self._numbers,
        )  # fmt: skip


def forward(problem: AttentionProblem, inputs: AttentionInputs, out: Tensor, lse: Tensor) -> None:
    """Launch the forward kernel."""
    ForwardPlan(problem, inputs)(inputs, out, lse)
