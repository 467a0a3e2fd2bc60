"""What the machine is: the only code that probes hardware."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch


class Device(NamedTuple):
    """The facts that choose a kernel's configuration."""

    family: str  # "cuda80" ... "cuda120", "cdna", "rdna", "interpreter" or "other"
    shared_memory: int  # bytes one program may use
    processors: int


_RDNA_PREFIXES = ("gfx10", "gfx11", "gfx12")


def family_of(backend: str, arch: int | str) -> str:
    """The family of a Triton target, for example ("cuda", 90) -> "cuda90", ("hip", "gfx942") -> "cdna"."""
    if backend == "cuda":
        known = (70, 80, 86, 89, 90, 100, 120)
        return f"cuda{max((a for a in known if a <= int(arch)), default=70)}"
    if backend == "hip":
        return "rdna" if str(arch).startswith(_RDNA_PREFIXES) else "cdna"
    return "other"


_assumed: dict[torch.device, Device] = {}


@contextmanager
def assumed(device: torch.device, facts: Device) -> Iterator[None]:
    """Within the block `probe` answers with these facts: to prepare launches for a device that may not be here."""
    before = _assumed.get(device)
    _assumed[device] = facts
    probe.cache_clear()
    try:
        yield
    finally:
        del _assumed[device]
        if before is not None:
            _assumed[device] = before
        probe.cache_clear()


def reads_e4m3(device: torch.device) -> bool:
    """Whether Triton's kernels can read float8_e4m3fn there."""
    return probe(device).family in {"cuda89", "cuda90", "cuda100", "cuda120", "interpreter"}


@cache
def probe(device: torch.device) -> Device:
    """The facts of a torch device."""
    if device in _assumed:
        return _assumed[device]
    if device.type == "cpu":
        return Device("interpreter", 1 << 30, 1)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            name = properties.gcnArchName.split(":")[0]
            return Device(family_of("hip", name), properties.shared_memory_per_block, properties.multi_processor_count)
        arch = properties.major * 10 + properties.minor
        shared = getattr(properties, "shared_memory_per_block_optin", None) or properties.shared_memory_per_block
        return Device(family_of("cuda", arch), shared, properties.multi_processor_count)
    return Device("other", 64 * 1024, 16)
