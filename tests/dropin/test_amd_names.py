"""The names that the original's AMD kernels have, on machines of either kind."""

import flash_attn_2_cuda
import pytest
import torch
from flash_attn.flash_attn_interface import USE_TRITON_ROCM
from flash_attn.flash_attn_triton_amd import interface_fa, utils

from flash_attn_plus import device


def test_raw_calls_are_those_of_the_extension():
    assert interface_fa.__all__ == flash_attn_2_cuda.__all__
    assert all(getattr(interface_fa, name) is getattr(flash_attn_2_cuda, name) for name in interface_fa.__all__)
    assert utils.USE_TRITON_ROCM is USE_TRITON_ROCM


@pytest.mark.skipif(torch.version.hip is not None, reason="a build of PyTorch for AMD")
def test_no_amd_device_without_hip():
    assert (utils.is_hip(), utils.is_cdna(), utils.is_rdna()) == (False, False, False)


@pytest.mark.parametrize(("arch", "kinds"), [("gfx942", (True, False)), ("gfx1100", (False, True))])
def test_kinds_of_amd_devices(arch, kinds, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with device.assumed(torch.device("cuda", 0), device.Device(device.family_of("hip", arch), 1 << 16, 64)):
        assert utils.is_hip()
        assert (utils.is_cdna(), utils.is_rdna()) == kinds
