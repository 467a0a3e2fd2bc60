"""Real text that every machine has: the sources of Python's own standard library, as bytes."""

import sysconfig
from pathlib import Path

import torch
from torch import Tensor


def load(limit: int) -> Tensor:
    """The first `limit` bytes of the standard library's top-level modules in the order of their names, as uint8."""
    folder = Path(sysconfig.get_path("stdlib"))
    data = bytearray()
    for path in sorted(folder.glob("*.py")):
        data += path.read_bytes()
        if len(data) >= limit:
            break
    if len(data) < limit:
        raise FileNotFoundError(
            f"{folder} holds {len(data)} bytes of Python sources, fewer than the {limit} to train on; use a Python"
            " whose standard library is installed as .py files"
        )
    return torch.frombuffer(data[:limit], dtype=torch.uint8)


def batches(data: Tensor, count: int, batch: int, seqlen: int, seed: int) -> Tensor:
    """int64 (count, batch, seqlen + 1): windows at random places, the same for the same seed on every machine."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(data) - seqlen - 1, (count, batch, 1), generator=generator)
    return data[starts + torch.arange(seqlen + 1)].long()
