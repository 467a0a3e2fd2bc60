"""(problem, device) -> launch configurations, best first; later ones need less shared memory."""

from flash_attn_plus.device import Device
from flash_attn_plus.problem import AttentionProblem
from flash_attn_plus.tuning.config import TileConfig


def _padded(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def forward_bytes(p: AttentionProblem, c: TileConfig) -> int:
    """Shared memory of the forward kernel: the query tile and the stages of keys and values."""
    d, dv = _padded(p.head_dim), _padded(p.head_dim_v)
    return (c.block_m * d + c.num_stages * c.block_n * (d + dv)) * p.dtype.itemsize


_INTERPRETER = [TileConfig(32, 32, 4, 1)]


def forward(p: AttentionProblem, device: Device) -> list[TileConfig]:
    """Configurations of the forward kernel."""
    if device.family == "interpreter":
        return _INTERPRETER
    return [TileConfig(128, 64, 8, 2)]


def dkdv(p: AttentionProblem, device: Device) -> list[TileConfig]:
    """Configurations of the dk/dv kernel."""
    if device.family == "interpreter":
        return _INTERPRETER
    return [TileConfig(64, 128, 8, 2)]


def dq(p: AttentionProblem, device: Device) -> list[TileConfig]:
    """Configurations of the dq kernel."""
    if device.family == "interpreter":
        return _INTERPRETER
    return [TileConfig(128, 64, 8, 2)]


def statistics(p: AttentionProblem) -> TileConfig:
    """Configuration of the statistics kernel: memory-bound, one pass over out and dout, 128 rows or a whole part."""
    return TileConfig(max(16, min(128, 8192 // _padded(p.head_dim_v))), 0, 4, 1)


def fits(p: AttentionProblem, device: Device) -> bool:
    """Whether any configuration fits the device's shared memory."""
    return any(forward_bytes(p, c) <= device.shared_memory for c in forward(p, device))
