"""The compile-time switches of one kernel variant."""

from typing import NamedTuple


class Features(NamedTuple):
    """What a call uses; part of the JIT key, so a switch that is off costs nothing."""

    has_left: bool = False  # a left window bound exists
    has_right: bool = False  # a right bound exists; causal is simply right == 0
    has_softcap: bool = False
    has_alibi: bool = False
    has_dropout: bool = False
    has_signed_scale: bool = (
        False  # softmax_scale <= 0: its sign is multiplied into q, since maxima want a positive one
    )
    has_cu_q: bool = False  # packed queries
    has_cu_k: bool = False  # packed keys, or lengths of paged keys
    has_used_k: bool = False
    has_leftpad: bool = False
    is_paged: bool = False
    is_exact: bool = False  # float32 inputs: no fast approximations
    precision: str = "ieee"  # how float32 tiles are multiplied
    has_blocks: bool = False  # tiles are listed: those of the visible blocks
    has_cut_blocks: bool = False  # blocks begin or end within tiles
    has_descriptors: bool = False  # the tiles of a loop come through tensor descriptors
    is_ahead: bool = False  # forward: a tile's products are asked for before the powers of the one before it
