"""Calls and models in words, as `info --explain` and `warmup` take them: "b=2 s=8192 h=32 hk=8 d=128 causal grad"."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from flash_attn_plus.errors import InvalidArgument
from flash_attn_plus.testing import Case

DTYPES = {
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16,
    "half": torch.float16, "fp32": torch.float32, "float32": torch.float32, "float": torch.float32,
    "fp64": torch.float64, "float64": torch.float64, "double": torch.float64,
}  # fmt: skip
Reader = Callable[[str, str | None], Any]
_LARGEST = (1 << 31) - 1  # of a size: kernels count in 32 bits
_MOST_SEQUENCES = 1 << 20  # in words, which tell the length of each


def name_of(dtype: torch.dtype) -> str:
    """float16 and the like, without torch in front."""
    return str(dtype).removeprefix("torch.")


def default_device() -> torch.device:
    """The accelerator that PyTorch sees, else the CPU."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.device(torch.accelerator.current_accelerator().type, torch.accelerator.current_device_index())


def device_name(where: torch.device) -> str:
    """What an accelerator calls itself; its type where PyTorch does not tell."""
    tell = getattr(torch.get_device_module(where), "get_device_name", None)
    return tell(where) if tell else where.type


def read_device(word: str, text: str | None) -> torch.device:
    """A device that is there; word is how the user named the argument."""
    if text is None:
        raise InvalidArgument(f"{word} needs a value, such as {word}=cpu or {word}=cuda:0")
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise InvalidArgument(f"{word}={text} names no device; write cpu, cuda or cuda:1") from error
    here = default_device()
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != here.type:
        what = "no accelerator" if here.type == "cpu" else f"the {here.type} devices of this machine only"
        raise InvalidArgument(f"{word}={text} is not here: PyTorch sees {what}; use {word}={here.type}")
    count = torch.accelerator.device_count()
    index = here.index if device.index is None else device.index
    if index >= count:
        raise InvalidArgument(f"{word}={text} is not here: PyTorch sees {count} of them, counted from 0")
    return torch.device(device.type, index)


def read_dtype(word: str, text: str | None) -> torch.dtype:
    """A dtype by its usual names."""
    if text not in DTYPES:
        raise InvalidArgument(f"{word}={text} is no dtype of attention; choose one of {', '.join(DTYPES)}")
    return DTYPES[text]


def read_count(word: str, text: str | None) -> int:
    """A positive integer."""
    if text is None or not text.isascii() or not text.isdigit() or not text.strip("0"):
        raise InvalidArgument(f"{word} needs a positive integer, such as {word}=8, not {text!r}")
    if len(text) > 18 or int(text) > _LARGEST:
        raise InvalidArgument(f"{word}={text[:20]} is too large; give at most {_LARGEST}")
    return int(text)


def _read_batch(word: str, text: str | None) -> int:
    if (batch := read_count(word, text)) > _MOST_SEQUENCES:
        raise InvalidArgument(f"{word}={batch} is too large; give at most {_MOST_SEQUENCES} sequences")
    return batch


def check_seconds(seconds: float) -> None:
    """Raise InvalidArgument for a --seconds that lets nothing start, or is no number."""
    if not seconds > 0:
        raise InvalidArgument(f"--seconds must be positive, not {seconds}")


def _read_flag(word: str, text: str | None) -> bool:
    if text is not None:
        raise InvalidArgument(f"{word} takes no value; write {word} alone instead of {word}={text}")
    return True


def _read_window(word: str, text: str | None) -> tuple[int, int]:
    try:
        left, right = (int(x) for x in (text or "").split(","))
    except ValueError as error:
        raise InvalidArgument(f"{word} needs two integers, such as {word}=128,0 (-1 is unbounded)") from error
    return left, right


def _read_sizes(word: str, text: str | None) -> tuple[int, int]:
    queries, comma, keys = (text or "").partition(",")
    if not comma:
        raise InvalidArgument(f"{word} needs queries and keys of a block, such as {word}=128,128, not {text!r}")
    return read_count(word, queries), read_count(word, keys)


def _number(default: float) -> Reader:
    def read(word: str, text: str | None) -> float:
        try:
            return default if text is None else float(text)
        except ValueError as error:
            raise InvalidArgument(f"{word} needs a number, such as {word}={default}, not {text!r}") from error

    return read


def _range_of(read_end: Callable[[str, str | None], int]) -> Reader:
    def read(word: str, text: str | None) -> tuple[int, int]:
        first, dots, last = (text or "").partition("..")
        low = read_end(word, first or None)
        high = read_end(word, last or None) if dots else low
        if high < low:
            raise InvalidArgument(f"{word}={text} ends before it begins; write {word}={high}..{low}")
        return low, high

    return read


_SHAPE: dict[str, Reader] = {
    "b": _read_batch, "h": read_count, "hk": read_count, "d": read_count, "dv": read_count, "dtype": read_dtype,
    "causal": _read_flag, "window": _read_window, "softcap": _number(30.0), "alibi": _read_flag,
    "dropout": _number(0.1), "varlen": _read_flag, "page": read_count, "deterministic": _read_flag,
}  # fmt: skip
CALL_WORDS: dict[str, Reader] = _SHAPE | {
    "s": read_count, "sq": read_count, "sk": read_count, "seqused": _read_flag, "leftpad": _read_flag,
    "grad": _read_flag, "device": read_device,
}  # fmt: skip
MODEL_WORDS: dict[str, Reader] = _SHAPE | {
    "b": _range_of(_read_batch),
    "s": _range_of(read_count),
    "decode": _read_flag,
    "train": _read_flag,
    "blocks": _read_sizes,
    "rmsnorm": read_count,
    "layernorm": read_count,
    "vocab": read_count,
    "rotary": _read_flag,
}


def read(text: str, words: Mapping[str, Reader]) -> dict[str, Any]:
    """word -> value of a description; raises InvalidArgument for an unknown, doubled or bad word."""
    found: dict[str, Any] = {}
    for part in text.split():
        word, equals, value = part.partition("=")
        if word not in words:
            near = difflib.get_close_matches(word, words, 1)
            hint = f"did you mean {near[0]}?" if near else f"known words: {', '.join(words)}"
            raise InvalidArgument(f"{part!r} is not understood; {hint}")
        if word in found:
            raise InvalidArgument(f"{word} is given twice; say it once")
        found[word] = words[word](word, value if equals else None)
    return found


class Call(NamedTuple):
    """One call in words."""

    case: Case
    dtype: torch.dtype
    device: torch.device
    has_gradients: bool
    is_deterministic: bool


def shape_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a case that calls and models share."""
    left, right = found.get("window", (-1, -1))
    heads = found.get("h", 16)
    return {
        "batch": found.get("b", 1), "heads": heads, "heads_k": found.get("hk", heads),
        "head_dim": found.get("d", 128), "head_dim_v": found.get("dv"), "left": left,
        "right": 0 if found.get("causal") else right, "softcap": found.get("softcap", 0.0),
        "dropout_p": found.get("dropout", 0.0), "alibi": "heads" if found.get("alibi") else "",
        "page_size": found.get("page", 0),
    }  # fmt: skip


def read_call(text: str) -> Call:
    """A call in words; sizes that are not said are those of a common layer (b=1, s=4096, h=16, d=128, bf16)."""
    found = read(text, CALL_WORDS)
    both = found.get("s", 4096)
    case = Case(**shape_of(found), seqlen_q=found.get("sq", both), seqlen_k=found.get("sk", both))
    if found.get("varlen"):
        lengths: dict[str, Any] = {
            "lengths_q": (case.seqlen_q,) * case.batch,
            "lengths_k": (case.seqlen_k,) * case.batch,
        }
        case = case._replace(**lengths)
    if found.get("seqused") or (case.page_size and case.lengths_k is None):
        case = case._replace(used=(case.seqlen_k,) * case.batch)
    if found.get("leftpad"):
        case = case._replace(leftpad=(0,) * case.batch)
    has_gradients = bool(found.get("grad"))
    if has_gradients and not case.has_backward:
        raise InvalidArgument("page, seqused and leftpad have no backward; leave out grad")
    device = found.get("device") or default_device()
    return Call(case, found.get("dtype", torch.bfloat16), device, has_gradients, bool(found.get("deterministic")))
