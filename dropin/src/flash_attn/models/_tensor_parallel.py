"""State dicts of GPTLMHeadModel spread over ranks, and put together again."""

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn.models._remap import WORDS, heads, qkv_rows
from flash_attn.utils.distributed import get_dim_for_local_rank

GATED_ACTIVATIONS = ("glu", "swiglu", "geglu")


class Split(NamedTuple):
    """How a tensor is spread: along `dim`, each of its stacked sections on its own, in that section's units.

    Without sizes the sections are equal.
    """

    dim: int
    units: Sequence[int] = (1,)
    sizes: Sequence[int] | None = None

    def sections(self, whole: int) -> Sequence[int]:
        """The sizes of the sections of a whole tensor."""
        return self.sizes or [whole // len(self.units)] * len(self.units)

    def shares(self, whole: int, world_size: int) -> list[list[int]]:
        """[section][rank] -> size."""
        return [
            [get_dim_for_local_rank(size, world_size, rank, unit) for rank in range(world_size)]
            for size, unit in zip(self.sections(whole), self.units, strict=True)
        ]

    def shard(self, x: Tensor, world_size: int, rank: int) -> Tensor:
        """The rank's part of a whole tensor."""
        whole = x.shape[self.dim]
        sections = x.split(self.sections(whole), dim=self.dim)
        pieces = [
            section.split(shares, dim=self.dim)[rank]
            for section, shares in zip(sections, self.shares(whole, world_size), strict=True)
        ]
        return torch.cat(pieces, dim=self.dim)

    def combine(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole tensor of every rank's part."""
        shares = self.shares(sum(x.shape[self.dim] for x in parts), len(parts))
        split = [x.split([s[rank] for s in shares], dim=self.dim) for rank, x in enumerate(parts)]
        return torch.cat([piece for pieces in zip(*split, strict=True) for piece in pieces], dim=self.dim)


def _splits(config) -> list[tuple[re.Pattern, Split]]:
    """(pattern of names, how they are spread)."""
    count, count_k, dim = heads(config)
    query_unit = count // count_k * dim
    fc1 = Split(0, (1, 1)) if config.activation_function in GATED_ACTIVATIONS else Split(0)
    layer = r"^transformer\.layers\.\d+\."
    table = {
        r"^transformer\.embeddings\.word_embeddings\.weight$": Split(0),
        r"^transformer\.embeddings\.position_embeddings\.weight$": Split(1),
        r"^lm_head\.(weight|bias)$": Split(0),
        layer + r"mixer\.Wqkv\.(weight|bias)$": Split(0, (query_unit, dim, dim), qkv_rows(config)),
        layer + r"mixer\.out_proj\.weight$": Split(1, (query_unit,)),
        layer + r"mlp\.fc1\.(weight|bias)$": fc1,
        layer + r"mlp\.fc2\.weight$": Split(1),
    }
    return [(re.compile(pattern), split) for pattern, split in table.items()]


_ON_FIRST_RANK = re.compile(r"\.(mixer\.out_proj|mlp\.fc2)\.bias$")  # a sum over ranks must add it once


def _split_of(name: str, splits: list[tuple[re.Pattern, Split]]) -> Split | None:
    return next((split for pattern, split in splits if pattern.search(name)), None)


def shard_state_dict_tp(state_dict, config, world_size, rank):
    """Reduce a whole state dict to a rank's part, in place.

    Args:
        config: the GPT2Config, for heads and activation.

    Returns:
        state_dict.
    """
    splits = _splits(config)
    for name in list(state_dict):
        split = _split_of(name, splits)
        if split is not None:
            state_dict[name] = split.shard(state_dict[name], world_size, rank)
        elif rank != 0 and _ON_FIRST_RANK.search(name):
            del state_dict[name]
    return state_dict


def combine_state_dicts_tp(state_dicts, config):
    """The whole state dict of every rank's, in rank order; the inverse of `shard_state_dict_tp`.

    Word embeddings may also be spread by columns, as in Meta's Llama checkpoints.
    """
    splits = _splits(config)
    whole = OrderedDict()
    for name, x in state_dicts[0].items():
        split = _split_of(name, splits)
        if name == WORDS and x.shape[1] * len(state_dicts) == config.hidden_size:
            split = Split(1)
        whole[name] = x if split is None else split.combine([part[name] for part in state_dicts])
    return whole
