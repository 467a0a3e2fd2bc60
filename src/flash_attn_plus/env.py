"""Every environment variable the engine reads, each read at call time so that a process may change it."""

import os

USE_FLAGGEMS = "FLASH_ATTENTION_USE_FLAGGEMS"  # TRUE: FlagGems, then ours; FALSE: the original CUDA kernels, then ours
BACKEND = "FLASH_ATTENTION_BACKEND"  # one backend by name; a call it cannot serve raises
FP32_PRECISION = "FLASH_ATTENTION_FP32_PRECISION"  # ieee (default), tf32x3 or tf32: products of float32 inputs
BATCH_INVARIANT = "FLASH_ATTENTION_BATCH_INVARIANT"  # 1: a sequence's result does not depend on the batch around it
DEBUG = "FLASH_ATTENTION_DEBUG"  # 1: check values that live on the device (lengths, page ids); costs a sync
TUNING_TABLE = (
    "FLASH_ATTENTION_TUNING_TABLE"  # a file of tiles measured by `flash-attn-plus tune`; unset: built-in ones
)
CUDA_LIBRARIES = "FLASH_ATTENTION_CUDA_LIBRARIES"  # files of original CUDA kernels that are not installed; read once

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}
_PRECISIONS = ("ieee", "tf32x3", "tf32")


def _boolean(name: str) -> bool | None:
    raw = os.environ.get(name)
    if raw is None or raw == "":
        return None
    value = raw.strip().lower()
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise ValueError(f"{name}={raw!r} is neither TRUE nor FALSE; set one of them or unset the variable")


def use_flaggems() -> bool | None:
    """TRUE, FALSE or None (unset: best available)."""
    return _boolean(USE_FLAGGEMS)


def backend() -> str | None:
    """The backend that must serve every call, or None."""
    return os.environ.get(BACKEND) or None


def debug() -> bool:
    """Whether device-side values are checked."""
    return bool(_boolean(DEBUG))


def batch_invariant() -> bool:
    """Whether a sequence's result must be bitwise the same in any batch."""
    return bool(_boolean(BATCH_INVARIANT))


def fp32_precision() -> str:
    """How float32 tiles are multiplied: "ieee", "tf32x3" or "tf32"."""
    raw = os.environ.get(FP32_PRECISION)
    if not raw:
        return "ieee"
    if raw.lower() not in _PRECISIONS:
        raise ValueError(f"{FP32_PRECISION}={raw!r} is unknown; choose one of {', '.join(_PRECISIONS)}")
    return raw.lower()


def tuning_table() -> str | None:
    """The file of measured tiles, or None."""
    return os.environ.get(TUNING_TABLE) or None


def cuda_libraries() -> tuple[str, ...]:
    """Files of original CUDA kernels, in a list like PATH's; looked at when the kernels are first asked for."""
    return tuple(filter(None, os.environ.get(CUDA_LIBRARIES, "").split(os.pathsep)))


_NAMES = tuple(n.encode() for n in (USE_FLAGGEMS, BACKEND, FP32_PRECISION, DEBUG, TUNING_TABLE, BATCH_INVARIANT))


def snapshot() -> tuple[bytes | str | None, ...]:
    """The raw value of every variable: part of the key of whatever is remembered between calls.

    It reads the mapping under os.environ where there is one: a tenth of the time of as many lookups, at every call.
    """
    raw = getattr(os.environ, "_data", None)
    if raw is None or os.name == "nt":
        return tuple(os.environ.get(n.decode()) for n in _NAMES)
    a, b, c, d, e, f = _NAMES
    return (raw.get(a), raw.get(b), raw.get(c), raw.get(d), raw.get(e), raw.get(f))
