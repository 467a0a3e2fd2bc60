"""Which feature each engine declares, as committed in support_matrix.json; run as a script to write it anew.

TRITON_INTERPRET=1 PYTHONPATH=src:tests python tests/numerics/support_matrix.py

What is declared is held to the oracle: by the tests beside this file for torch and triton, by tests/gpu for the others.
"""

import json
from pathlib import Path

import torch
from cases import HEAD_DIMS, cache, crossed, dense, large_logits, varlen
from serving import CUDA_ENGINES, engine, refuses, test_device

from flash_attn_plus import selection
from flash_attn_plus.backends.base import Backend
from flash_attn_plus.testing import Case

PATH = Path(__file__).with_suffix(".json")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def features() -> dict[str, Case]:
    """Every tested case, and limits of the head dim, by name; medium size, whatever runs."""
    found = dense("medium") | varlen("medium") | cache("medium") | large_logits("medium") | crossed("medium")
    square = dense("medium")[f"head_dim_{HEAD_DIMS[0]}"]
    found |= {f"head_dim_{d}": square._replace(head_dim=d) for d in (384, 512)}
    long = Case(batch=2, seqlen_q=643, seqlen_k=1037, heads=6, heads_k=2)
    masks = {"full": {}, "causal": {"right": 0}, "window": {"left": 200, "right": 30}}
    masks["varlen_causal"] = {"right": 0, "lengths_q": (600, 1, 0, 300), "lengths_k": (700, 9, 5, 200)}
    for d in (64, 128, 256):
        found |= {f"long_{name}_{d}": long._replace(head_dim=d, **mask) for name, mask in masks.items()}
    return found


def engines() -> dict[str, Backend]:
    """The backends and, on a GPU, the engines of the cuda backend, as far as they are installed here."""
    names = selection.NAMES
    if test_device() == "cpu":
        return {name: engine(name) for name in names}  # asked about a CPU, those of others load nothing
    split = [n for name in names for n in ([f"cuda {e}" for e in CUDA_ENGINES] if name == "cuda" else [name])]
    return {name: engine(name) for name in split if engine(name).unavailable() is None}


def _refused(backend: Backend, dtype: torch.dtype, is_backward: bool) -> str:
    """The features that a backend does not serve in one pass, between spaces."""
    asked = {name: case for name, case in features().items() if case.has_backward or not is_backward}
    names = [name for name, case in asked.items() if refuses(backend, case, dtype, is_backward)]
    return " ".join(names) if len(names) < len(asked) else "everything"


def matrix() -> dict[str, dict[str, dict[str, str]]]:
    """engine -> pass -> dtype -> the features that it does not serve on the device under test."""
    return {
        name: {
            direction: {str(dtype).removeprefix("torch."): _refused(backend, dtype, is_backward) for dtype in DTYPES}
            for direction, is_backward in (("forward", False), ("backward", True))
        }
        for name, backend in engines().items()
    }


def committed() -> dict:
    """device -> matrix, as committed."""
    return json.loads(PATH.read_text()) if PATH.exists() else {}


def write(path: Path = PATH) -> None:
    """Store the matrix of the device under test beside those of other devices and of engines that are not here."""
    stored = committed()
    rows = stored.get(test_device(), {}).get("not served", {}) | matrix()
    stored[test_device()] = {"features": len(features()), "not served": rows}
    path.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    write()
