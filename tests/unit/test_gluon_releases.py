"""The Hopper backend serves under releases of Triton that its kernels are proven with, and says why not elsewhere."""

import pytest
import torch

from flash_attn_plus.backends import gluon_hopper

triton = pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("version", "word"),
    [
        ("3.6.0", None),
        ("3.7.1", None),
        ("3.7.1+git1234", None),
        ("3.5.1", "not proven"),
        ("3.8.0", "not proven"),
        ("3.9.0", "hangs"),
        ("3.60.0", "not proven"),
    ],
)
def test_releases(version, word, monkeypatch):
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    reason = gluon_hopper.GluonHopper().unavailable()
    assert gluon_hopper.has_proven_gluon() == (word is None)
    if word is None:
        assert reason is None
    else:
        assert word in reason
        assert version in reason
