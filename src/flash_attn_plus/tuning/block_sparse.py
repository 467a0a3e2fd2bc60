"""Tiles under a block mask: those of dense calls, made smaller where blocks are smaller."""

from flash_attn_plus.tuning.config import TileConfig

SMALLEST = 64  # smaller tiles waste more of the matrix units than hidden blocks inside a tile do


def _fitted(tile: int, block: int) -> int:
    """The tile, halved until it divides the block; not below SMALLEST."""
    while tile > SMALLEST and block % tile:
        tile //= 2
    return tile


def fitted(config: TileConfig, block_size: tuple[int, int]) -> TileConfig:
    """A configuration whose tiles lie within blocks where they can; with half the scores go half the warps."""
    block_m, block_n = _fitted(config.block_m, block_size[0]), _fitted(config.block_n, block_size[1])
    shrunk = (config.block_m * config.block_n) // (block_m * block_n)
    return config._replace(block_m=block_m, block_n=block_n, num_warps=max(4, config.num_warps // shrunk))
