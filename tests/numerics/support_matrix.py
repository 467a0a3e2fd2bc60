"""Which feature each backend declares, as committed in support_matrix.json; run as a script to write it anew.

TRITON_INTERPRET=1 PYTHONPATH=src:tests python tests/numerics/support_matrix.py
"""

import json
from pathlib import Path

import torch
from cases import HEAD_DIMS, cache, crossed, dense, large_logits, varlen
from serving import BACKENDS, is_served, test_device

PATH = Path(__file__).with_suffix(".json")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def features() -> dict:
    """Every tested case, and limits of the head dim, by name; medium size, whatever runs."""
    found = dense("medium") | varlen("medium") | cache("medium") | large_logits("medium") | crossed("medium")
    square = dense("medium")[f"head_dim_{HEAD_DIMS[0]}"]
    return found | {f"head_dim_{d}": square._replace(head_dim=d) for d in (384, 512)}


def matrix() -> dict[str, dict[str, list[str]]]:
    """backend -> dtype -> what it does not serve on the device under test, with gradients where they are defined."""
    every = features()

    def refused(backend: str, dtype: torch.dtype) -> list[str]:
        names = [name for name, case in every.items() if not is_served(backend, case, dtype)]
        return names if len(names) < len(every) else ["everything"]

    return {
        backend: {str(dtype).removeprefix("torch."): refused(backend, dtype) for dtype in DTYPES}
        for backend in BACKENDS
    }


def committed() -> dict:
    """device -> matrix, as committed."""
    return json.loads(PATH.read_text()) if PATH.exists() else {}


def write() -> None:
    """Store the matrix of the device under test beside those of other devices."""
    found = committed() | {test_device(): {"features": len(features()), "not served": matrix()}}
    PATH.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    write()
