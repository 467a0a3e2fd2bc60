"""The visible band of one sequence: which rows see keys, which keys a row block sees, and the mask of a tile."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn_plus.problem import normalize_band


class Runs:
    """Several ranges of keys, in order, as one; `start` and `stop` enclose them."""

    def __init__(self, runs: Sequence[range]):
        self.runs = runs
        self.start, self.stop = (runs[0].start, runs[-1].stop) if runs else (0, 0)

    def __len__(self) -> int:
        return sum(map(len, self.runs))


Keys = range | Runs


def positions(keys: Keys, device: torch.device) -> Tensor:
    """int32 (keys,): the keys' numbers."""
    runs = keys.runs if isinstance(keys, Runs) else (keys,)
    return torch.cat([torch.arange(run.start, run.stop, dtype=torch.int32, device=device) for run in runs])


def selector(keys: Keys, device: torch.device) -> slice | Tensor:
    """What takes the keys out of a dimension that holds all of them; a view where they are adjacent."""
    if len(keys) == keys.stop - keys.start:
        return slice(keys.start, keys.stop)
    return positions(keys, device)


class Band(NamedTuple):
    """Keys -left <= j - (i + len_k - len_q) <= right; -1 is unbounded. Bounds that cannot bind are -1."""

    len_q: int
    len_k: int
    left: int
    right: int

    @classmethod
    def of(cls, len_q: int, len_k: int, left: int, right: int) -> "Band":
        """The band with bounds that cannot bind at these lengths turned into -1."""
        return cls(len_q, len_k, *normalize_band(left, right, len_q, len_k))

    @property
    def offset(self) -> int:
        """The key aligned with query 0; negative where there are more queries than keys."""
        return self.len_k - self.len_q

    @property
    def first_row(self) -> int:
        """Rows before this one see no key; every row from it on sees at least one."""
        if self.len_k == 0:
            return self.len_q
        return max(0, -self.offset - self.right) if self.right >= 0 else 0

    def keys_per_block(self, rows: int) -> int:
        """At least as many keys as any block of that many rows can see."""
        width = self.left + self.right + rows if self.left >= 0 and self.right >= 0 else self.len_k
        return min(self.len_k, width)

    def keys(self, rows: range) -> range:
        """The keys that at least one of the rows can see."""
        start = max(0, rows.start + self.offset - self.left) if self.left >= 0 else 0
        stop = min(self.len_k, rows.stop + self.offset + self.right) if self.right >= 0 else self.len_k
        return range(start, stop)

    def is_open(self, rows: range, cols: Keys) -> bool:
        """Whether every one of the rows sees every one of the keys."""
        nearest, farthest = rows.start + self.offset, rows.stop - 1 + self.offset
        return (self.right < 0 or cols.stop - 1 <= nearest + self.right) and (
            self.left < 0 or cols.start >= farthest - self.left
        )

    def distance(self, rows: range, cols: Keys, device: torch.device) -> Tensor:
        """int32 (rows, cols): how far each key lies after the one aligned with the row."""
        aligned = torch.arange(rows.start + self.offset, rows.stop + self.offset, dtype=torch.int32, device=device)
        return positions(cols, device) - aligned[:, None]

    def hidden(self, rows: range, cols: Keys, device: torch.device) -> Tensor | None:
        """Bool (rows, cols), true where the key is outside the band; None when none of the tile is."""
        if self.is_open(rows, cols):
            return None
        distance = self.distance(rows, cols, device)
        if self.left < 0:
            return distance > self.right
        if self.right < 0:
            return distance < -self.left
        return (distance > self.right) | (distance < -self.left)


def row_blocks(first: int, last: int, size: int) -> list[range]:
    """[first, last) cut into blocks of at most `size` rows."""
    return [range(start, min(start + size, last)) for start in range(first, last, size)]
