"""A machine on which every engine of others is installed, as far as adapters can tell."""

import pytest
import torch
from engines import CUDNN, FA3, TORCH_FA2, Extension, Fa4, FlagGems, forget

from flash_attn_plus import device, env
from flash_attn_plus.backends import cuda_cudnn, cuda_fa2_extension, cuda_fa2_torch, cuda_fa3, cuda_fa4, flaggems

PROBES = {
    "flaggems": (flaggems.PROBE, FlagGems),
    "fa2": (cuda_fa2_extension.PROBE, Extension),
    "torch_fa2": (cuda_fa2_torch.PROBE, TORCH_FA2),
    "fa3": (cuda_fa3.PROBE, FA3),
    "fa4": (cuda_fa4.PROBE, Fa4),
    "cudnn": (cuda_cudnn.PROBE, CUDNN),
}


@pytest.fixture
def hopper(monkeypatch):
    """PyTorch seems to see a Hopper GPU, and nobody wishes for a backend."""
    for name in (env.BACKEND, env.USE_FLAGGEMS, env.CUDA_LIBRARIES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device, "probe", lambda where: device.Device("cuda90", 232448, 132))
    forget()
    yield monkeypatch
    forget()


@pytest.fixture
def installed(hopper):
    """Every engine is installed; returns the function that takes some away again, with a sentence why."""
    for probe, value in PROBES.values():
        hopper.setattr(probe, "_answer", (value, None))

    def remove(*names: str, why: str = "not here") -> None:
        for name in names:
            hopper.setattr(PROBES[name][0], "_answer", (None, f"{name} {why}"))
        forget()

    return remove
