"""Tiles that were measured on a device and saved: `flash-attn-plus tune` writes such a table, the engine reads it.

The variable FLASH_ATTENTION_TUNING_TABLE names the file, JSON. A file is read once a process. An entry counts for
calls like the measured one: same kernel, device family, dtype, padded head dims and window bounds, no dropout, softcap,
ALiBi or pages; among those the one measured at the length nearest to the call's. Others keep the built-in tables.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from flash_attn_plus import env
from flash_attn_plus.errors import InvalidArgument
from flash_attn_plus.problem import AttentionProblem
from flash_attn_plus.tuning.config import TileConfig, padded

FORMAT = "flash-attn-plus tiles, version 1"
KERNELS = ("forward", "dkdv", "dq")
_LIMITS = {"block_m": (16, 512), "block_n": (16, 512), "num_warps": (1, 32)}  # powers of two within these
_MOST_STAGES = 8
# What changes a kernel's loop so much that plain calls say nothing about it.
_UNLIKE = ("has_dropout", "has_softcap", "has_alibi", "page_size", "has_block_mask")


class Key(NamedTuple):
    """Which calls an entry is for."""

    kernel: str
    family: str
    dtype: str
    width: int  # padded head dim
    width_v: int
    has_left: bool
    has_right: bool


class Entry(NamedTuple):
    """One measured choice; the times are of the pass that the kernel belongs to."""

    key: Key
    seqlen: int
    config: TileConfig
    ms: float
    default_ms: float  # with the built-in tables' choice, in the same run


def key_of(kernel: str, p: AttentionProblem, family: str) -> Key:
    """What an entry for the problem is filed under."""
    dtype = str(p.dtype).removeprefix("torch.")
    return Key(kernel, family, dtype, padded(p.head_dim), padded(p.head_dim_v), p.left >= 0, p.right >= 0)


def _refuse(source: str, why: str) -> InvalidArgument:
    return InvalidArgument(
        f"the tuning table {source} {why}; write one with `flash-attn-plus tune`, or unset {env.TUNING_TABLE}"
    )


def _number(source: str, where: str, row: dict, name: str, kinds: tuple[type, ...]) -> Any:
    value = row.get(name)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise _refuse(source, f"has {where} whose {name} is {value!r}")
    return value


def _config(source: str, where: str, row: Any) -> TileConfig:
    # Tables that were written before kernels read through descriptors say nothing about them.
    if not isinstance(row, dict) or row.keys() | {"by_descriptor"} != set(TileConfig._fields):
        raise _refuse(source, f"has {where} whose config does not hold exactly {', '.join(TileConfig._fields)}")
    for name, (least, most) in _LIMITS.items():
        value = _number(source, where, row, name, (int,))
        if not least <= value <= most or value & (value - 1):
            raise _refuse(source, f"has {where} whose {name} is {value}, no power of two from {least} to {most}")
    if not 1 <= _number(source, where, row, "num_stages", (int,)) <= _MOST_STAGES:
        raise _refuse(source, f"has {where} whose num_stages is {row['num_stages']}, not from 1 to {_MOST_STAGES}")
    _number(source, where, row, "is_split", (bool,))
    _number(source, where, {"by_descriptor": False} | row, "by_descriptor", (bool,))
    return TileConfig(**row)


def _entry(source: str, number: int, row: Any) -> Entry:
    where = f"an entry, number {number},"
    if not isinstance(row, dict):
        raise _refuse(source, f"has {where} that is no object")
    kernel = row.get("kernel")
    if kernel not in KERNELS:
        raise _refuse(source, f"has {where} whose kernel is {kernel!r}, none of {', '.join(KERNELS)}")
    texts = [_number(source, where, row, name, (str,)) for name in ("family", "dtype")]
    widths = [_number(source, where, row, name, (int,)) for name in ("width", "width_v")]
    bounds = [_number(source, where, row, name, (bool,)) for name in ("has_left", "has_right")]
    times = [float(_number(source, where, row, name, (int, float))) for name in ("ms", "default_ms")]
    seqlen = _number(source, where, row, "seqlen", (int,))
    if seqlen < 1:
        raise _refuse(source, f"has {where} whose seqlen is {seqlen}, not positive")
    return Entry(Key(kernel, *texts, *widths, *bounds), seqlen, _config(source, where, row.get("config")), *times)


def parse(source: str, text: str) -> list[Entry]:
    """The entries of a table's text; raises InvalidArgument, which names the source, for one that is not sound."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise _refuse(source, f"is no JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _refuse(source, f"does not say {FORMAT!r} as its format")
    if not isinstance(content.get("entries"), list):
        raise _refuse(source, "holds no list of entries")
    return [_entry(source, number, row) for number, row in enumerate(content["entries"], 1)]


def render(entries: list[Entry], about: dict[str, Any]) -> str:
    """The text of a table; `about` says where its numbers come from (device, versions, date, command)."""
    rows = [e.key._asdict() | {"seqlen": e.seqlen, "config": e.config._asdict()} | _times(e) for e in entries]
    return json.dumps({"format": FORMAT, **about, "entries": rows}, indent=1) + "\n"


def _times(entry: Entry) -> dict[str, float]:
    return {"ms": round(entry.ms, 6), "default_ms": round(entry.default_ms, 6)}


def read(path: str) -> list[Entry]:
    """The entries of a file; raises InvalidArgument when it cannot be read or is not sound."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _refuse(path, f"cannot be read ({error})") from error
    return parse(path, text)


@cache
def load(path: str) -> dict[Key, tuple[Entry, ...]]:
    """The entries of a file by key, read once; raises as `read` does."""
    found: dict[Key, tuple[Entry, ...]] = {}
    for entry in read(path):
        found[entry.key] = (*found.get(entry.key, ()), entry)
    return found


def lookup(path: str, kernel: str, p: AttentionProblem, family: str) -> TileConfig | None:
    """The measured tiles for a problem, or None when the table has none."""
    if any(getattr(p, name) for name in _UNLIKE):
        return None
    entries = load(path).get(key_of(kernel, p, family), ())
    wanted = math.log2(max(1, p.seqlen_k))
    return min(entries, key=lambda e: abs(math.log2(e.seqlen) - wanted)).config if entries else None


_only: dict[str, TileConfig] = {}


@contextmanager
def only(kernel: str, config: TileConfig) -> Iterator[None]:
    """Within the block the kernel is launched with this configuration and no other: what a search measures with."""
    _only[kernel] = config
    try:
        yield
    finally:
        del _only[kernel]


def forced(kernel: str) -> TileConfig | None:
    """The configuration of an `only` block, or None."""
    return _only.get(kernel)
