"""State dicts of other implementations and ours: tables of names, and how tensors are laid out, both ways."""

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

WORDS = "transformer.embeddings.word_embeddings.weight"
POSITIONS = "transformer.embeddings.position_embeddings.weight"
HEAD = "lm_head.weight"
LAYER = "transformer.layers.{i}."


class Layout(NamedTuple):
    """How one tensor of ours is made of tensors of theirs, and the inverse; both are given the config."""

    join: Callable[[Sequence[Tensor], Any], Tensor]
    split: Callable[[Tensor, Any], Sequence[Tensor]]


class Rule(NamedTuple):
    """One name of ours and the names of theirs that hold the same numbers.

    `{i}` stands for every layer, and a `*` at the end for weight and bias. A rule whose names are absent is skipped.
    """

    ours: str
    theirs: str | Sequence[str]
    layout: Layout | None = None


def heads(config) -> tuple[int, int, int]:
    """(query heads, key heads, head dim)."""
    count = config.num_attention_heads
    return count, getattr(config, "n_head_kv", None) or count, config.hidden_size // count


def qkv_rows(config) -> list[int]:
    """Rows of q, k and v in Wqkv."""
    count, count_k, dim = heads(config)
    return [count * dim, count_k * dim, count_k * dim]


def stacked(sizes: Callable[[Any], Sequence[int]] | int) -> Layout:
    """Theirs on top of each other: so many of equal rows, or of sizes(config) rows."""

    def split(x: Tensor, config) -> Sequence[Tensor]:
        return x.chunk(sizes) if isinstance(sizes, int) else x.split(sizes(config))

    return Layout(lambda tensors, config: torch.cat(tuple(tensors)), split)


def transposed(layout: Layout | None = None) -> Layout:
    """Theirs is the transpose of a linear layer's weight (vectors stay)."""
    inner = layout or Layout(lambda tensors, config: tensors[0], lambda x, config: [x])
    return Layout(
        lambda tensors, config: inner.join([x.t() for x in tensors], config).contiguous(),
        lambda x, config: [part.t().contiguous() for part in inner.split(x, config)],
    )


def grouped_qkv(groups: Callable[[Any], tuple[int, int]]) -> Layout:
    """Theirs has q, k and v of each group of heads together: rows (groups, q heads + k + v, head dim).

    groups(config) is (groups, q heads in each).
    """

    def join(tensors: Sequence[Tensor], config) -> Tensor:
        count, size = groups(config)
        x = tensors[0].unflatten(0, (count, size + 2, -1))
        return torch.cat([part.flatten(0, 2) for part in x.split((size, 1, 1), dim=1)])

    def split(x: Tensor, config) -> list[Tensor]:
        count, size = groups(config)
        q, kv = x.unflatten(0, (count * (size + 2), -1)).split((count * size, 2 * count))
        parts = (q.unflatten(0, (count, size)), *kv.unflatten(0, (2, count, 1)))
        return [torch.cat(parts, dim=1).flatten(0, 2)]

    return Layout(join, split)


def _padded(x: Tensor, config, value: float) -> Tensor:
    multiple = getattr(config, "pad_vocab_size_multiple", 1)
    more = -x.shape[0] % multiple
    return F.pad(x, (*[0, 0] * (x.ndim - 1), 0, more), value=value) if more else x


def vocabulary(value: float = 0.0) -> Layout:
    """Rows padded with `value` to a multiple of `pad_vocab_size_multiple`."""

    def split(x: Tensor, config) -> list[Tensor]:
        return [x[: getattr(config, "orig_vocab_size", config.vocab_size)]]

    return Layout(lambda tensors, config: _padded(tensors[0], config, value), split)


class Remap:
    """A table of rules, applied in either direction.

    Args:
        rules: names that no rule mentions keep their name, so that strict loading reports them.
        dropped: pattern of names of theirs that hold nothing to load, such as masks and rotary frequencies.
        renamed: (pattern, replacement) pairs that bring variants of their names to the form of the rules.
    """

    def __init__(self, rules: Sequence[Rule], dropped: str = r"(?!)", renamed: Sequence[tuple[str, str]] = ()):
        self.rules = [part for rule in rules for part in _expanded(rule)]
        self.dropped = re.compile(dropped)
        self.renamed = renamed

    def _names(self, config):
        """(our name, their names, layout) for every layer."""
        for rule in self.rules:
            for i in range(config.num_hidden_layers) if "{i}" in rule.ours else (0,):
                yield rule.ours.format(i=i), [name.format(i=i) for name in rule.theirs], rule.layout

    def _canonical(self, name: str) -> str:
        for pattern, replacement in self.renamed:
            name = re.sub(pattern, replacement, name)
        return name

    def __call__(self, state_dict, config) -> OrderedDict:
        """Ours of theirs."""
        rest = {self._canonical(name): x for name, x in state_dict.items()}
        rest = {name: x for name, x in rest.items() if not self.dropped.search(name)}
        ours = OrderedDict()
        for name, theirs, layout in self._names(config):
            if all(key in rest for key in theirs):
                tensors = [rest.pop(key) for key in theirs]
                ours[name] = tensors[0] if layout is None else layout.join(tensors, config)
        ours.update(rest)
        if _has_tied_head(config) and WORDS in ours:
            ours[HEAD] = ours[WORDS]
        return ours

    def inverse(self, state_dict, config) -> OrderedDict:
        """Theirs of ours."""
        rest, theirs = dict(state_dict), OrderedDict()
        for name, keys, layout in self._names(config):
            if name in rest:
                x = rest.pop(name)
                theirs.update(zip(keys, [x] if layout is None else layout.split(x, config), strict=True))
        if _has_tied_head(config):
            rest.pop(HEAD, None)
        theirs.update(rest)
        return theirs


def _has_tied_head(config) -> bool:
    """Whether the language model's head is the word embeddings, and so needs no name of theirs."""
    return getattr(config, "tie_word_embeddings", True)


def _expanded(rule: Rule) -> list[Rule]:
    """The rule with its names in a list, once for weight and once for bias if they end with a star."""
    theirs = [rule.theirs] if isinstance(rule.theirs, str) else list(rule.theirs)
    if not rule.ours.endswith("*"):
        return [rule._replace(theirs=theirs)]
    return [
        Rule(rule.ours[:-1] + kind, [name[:-1] + kind for name in theirs], rule.layout) for kind in ("weight", "bias")
    ]
