"""mamba's attention layer, which decodes through our cache, and ESM's, which packs and turns through our functions."""

import copy
import importlib

import pytest
import torch
from flash_attn import flash_attn_with_kvcache
from flash_attn.layers.rotary import RotaryEmbedding
from flash_attn.ops.triton.rotary import apply_rotary
from flash_attn.utils.generation import InferenceParams
from programs import open_packages, operator_calls

from flash_attn_plus.testing import assert_close

open_packages("mamba_ssm", "modules")
open_packages("esm", "layers")
mamba = importlib.import_module("mamba_ssm.modules.mha")
esm = importlib.import_module("esm.layers.attention")
esm_rotary = importlib.import_module("esm.layers.rotary")
PROMPT, LENGTH, CAPACITY = 5, 12, 20


@pytest.fixture
def steps(monkeypatch) -> list:
    """What mamba passed to our function over a cache, call by call."""
    calls, attend = [], mamba.flash_attn_with_kvcache
    assert attend is flash_attn_with_kvcache
    monkeypatch.setattr(
        mamba, "flash_attn_with_kvcache", lambda *args, **named: calls.append(args) or attend(*args, **named)
    )
    return calls


def normal(*shape: int, device: str) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)


@pytest.mark.parametrize("rotary_dim", [0, 16])
def test_mamba_decoding(rotary_dim, device, steps):
    """Steps over a cache, whose halves are views, against the same layer over the whole sequence at once."""
    torch.manual_seed(0)
    layer = mamba.MHA(
        64, 4, num_heads_kv=2, causal=True, layer_idx=0, rotary_emb_dim=rotary_dim, rotary_emb_base=100.0
    ).to(device)  # fmt: skip
    assert rotary_dim == 0 or isinstance(layer.rotary_emb, RotaryEmbedding)
    x = normal(3, LENGTH, 64, device=device)
    parameters = InferenceParams(max_seqlen=CAPACITY, max_batch_size=3)
    with torch.no_grad():
        eager = layer(x)
        exact = copy.deepcopy(layer).double()(x.double())
        outs = [layer(x[:, :PROMPT], parameters)]
        cache = parameters.key_value_memory_dict[0][0]
        cache[:, PROMPT:] = torch.nan  # what is not written yet must not be read
        assert not steps
        for i in range(PROMPT, LENGTH):
            parameters.seqlen_offset = i
            outs.append(layer(x[:, i : i + 1], parameters))
    assert len(steps) == LENGTH - PROMPT
    assert_close("decoded", torch.cat(outs, 1), exact, eager)
    assert cache[:, :LENGTH].isfinite().all()
    assert cache[:, LENGTH:].isnan().all()


def test_mamba_decoding_with_a_length_for_each_sequence(device, steps):
    """Sequences of different lengths share a batch; each continues behind its own last key."""
    torch.manual_seed(0)
    layer = mamba.MHA(64, 4, causal=True, layer_idx=0, rotary_emb_dim=16).to(device)
    lengths = torch.tensor([5, 2, 4], dtype=torch.int32, device=device)
    x = normal(3, 6, 64, device=device)
    parameters = InferenceParams(max_seqlen=CAPACITY, max_batch_size=3)
    with torch.no_grad():
        layer(x[:, :5], parameters)
        parameters.seqlen_offset, parameters.lengths_per_sample = 5, lengths
        out = layer(x[:, 5:], parameters)
        rows = [torch.cat((x[i : i + 1, :n], x[i : i + 1, 5:]), 1) for i, n in enumerate(lengths.tolist())]
        eager = torch.cat([layer(row)[:, -1:] for row in rows])
        exact = torch.cat([copy.deepcopy(layer).double()(row.double())[:, -1:] for row in rows])
    assert len(steps) == 1
    assert_close("decoded", out, exact, eager)


def test_esm_attention(device, monkeypatch):
    """Packed qkv turned in place and attended to, against its own layer of padded sequences."""
    turn = esm_rotary.apply_triton_rotary
    assert turn is apply_rotary
    torch.manual_seed(0)
    flash, plain = esm.FlashMultiHeadAttention(64, 4).to(device), esm.MultiHeadAttention(64, 4).to(device)
    plain.load_state_dict(flash.state_dict())
    mask = torch.arange(12, device=device) < torch.tensor([12, 5, 9], device=device)[:, None]
    x = normal(3, 12, 64, device=device)
    with torch.no_grad():
        with operator_calls() as calls:
            eager = plain(x, mask)[mask]
            exact = copy.deepcopy(plain).double()(x.double(), mask)[mask]
        assert not calls
        turned = []
        monkeypatch.setattr(
            esm_rotary, "apply_triton_rotary", lambda x, *args, **named: turned.append(x) or turn(x, *args, **named)
        )
        with operator_calls() as calls:
            actual = flash(x[mask], mask)
    assert calls == {"forward packed": 1}
    assert len(turned) == 2
    assert_close("attention", actual, exact, eager)
