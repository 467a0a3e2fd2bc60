"""Reading the weights of a checkpoint, from a folder or from the Hugging Face hub."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

# (file name, it is an index of shards), in the order they are looked for.
_FILES = (
    ("pytorch_model.bin", False),
    ("pytorch_model.bin.index.json", True),
    ("model.safetensors", False),
    ("model.safetensors.index.json", True),
)


def _read(path: str, device: str | torch.device | None) -> dict[str, torch.Tensor]:
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path, device=str(device or "cpu"))
    return torch.load(path, map_location=device, weights_only=True)


def _finder(model_name: str) -> Callable[[str], str | None]:
    """find(file name) -> local path or None."""
    folder = Path(model_name)
    if folder.is_dir():
        return lambda name: str(folder / name) if (folder / name).is_file() else None
    from transformers.utils import cached_file

    return lambda name: cached_file(model_name, name, _raise_exceptions_for_missing_entries=False)


def _paths(model_name: str) -> list[str]:
    find = _finder(model_name)
    for name, is_index in _FILES:
        path = find(name)
        if path is None:
            continue
        if not is_index:
            return [path]
        with open(path, encoding="utf-8") as index:
            shards = {shard: find(shard) for shard in sorted(set(json.load(index)["weight_map"].values()))}
        missing = [shard for shard, found in shards.items() if found is None]
        if missing:
            raise OSError(f"{', '.join(missing)} of {model_name} was not found, though {name} lists it")
        return list(shards.values())
    raise OSError(f"Model name {model_name} was not found: it has none of {', '.join(name for name, _ in _FILES)}")


def state_dict_from_pretrained(model_name, device=None, dtype=None):
    """The state dict of a checkpoint.

    Args:
        model_name: a folder, or a name on the hub (then transformers is needed); the weights may be one file or
            shards with an index, as PyTorch's pickle (of which only tensors are read) or as safetensors.
        device: of the result; default the CPU.
        dtype: of the result; default as stored. Weights that change it are converted on the CPU first.

    Raises:
        OSError: no weights were found.
    """
    read_device = device if dtype in (None, torch.float32) else "cpu"
    state_dict = {}
    for path in _paths(str(model_name)):
        state_dict.update(_read(path, read_device))
    if dtype is None and device is None:
        return state_dict
    return {name: x.to(device=device, dtype=dtype) for name, x in state_dict.items()}
