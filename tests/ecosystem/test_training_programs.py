"""verl's log-probabilities and padding, and axolotl's patches: their own modules, run unchanged."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from language_models import VOCABULARY, admit_cpu, decoder
from programs import open_packages, operator_calls
from torch import nn

from flash_attn_plus import ops
from flash_attn_plus.testing import assert_close

admit_cpu()
open_packages("verl", "utils")
open_packages("axolotl", "monkeypatch", "utils")
torch_functional = importlib.import_module("verl.utils.torch_functional")
attention_utils = importlib.import_module("verl.utils.attention_utils")
llama_patches = importlib.import_module("axolotl.monkeypatch.llama_attn_hijack_flash")
mistral_patches = importlib.import_module("axolotl.monkeypatch.mistral_attn_hijack_flash")
stablelm_patches = importlib.import_module("axolotl.monkeypatch.stablelm_attn_hijack_flash")
btlm_patches = importlib.import_module("axolotl.monkeypatch.btlm_attn_hijack_flash")
checkpointing = importlib.import_module("axolotl.monkeypatch.selective_checkpointing")
LAYERS = 2
LOSS_CALLS = {"cross_entropy_forward": 1, "cross_entropy_backward": 1}
INPLACE_LOSS_CALLS = {"cross_entropy_forward": 1, "cross_entropy_backward_": 1}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def left_padding(lengths: tuple[int, ...]) -> torch.Tensor:
    return (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()


@pytest.mark.parametrize("inplace_backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_verl_log_probabilities(dtype, inplace_backward, device):
    logits, labels = (normal(3, 7, VOCABULARY) * 3.0).to(device, dtype), integers(3, 7).to(device)
    weights = normal(3, 7, seed=2).to(device)

    def results(function, dtype):
        x = logits.to(dtype, copy=True).requires_grad_()
        values = function(x * 1.0)
        (values * weights.to(values)).sum().backward()
        return {"values": values.detach(), "gradient": x.grad}

    def without_us(x):
        return torch_functional.logprobs_from_logits_v2(x, labels)

    def verl(x):
        return torch_functional.logprobs_from_logits(x, labels, inplace_backward=inplace_backward)

    with operator_calls() as calls:
        actual = results(verl, dtype)
    assert calls == (INPLACE_LOSS_CALLS if inplace_backward else LOSS_CALLS)
    expected, eager = results(without_us, torch.float64), results(without_us, dtype)
    for name, value in actual.items():
        assert_close(name, value, expected[name], eager[name])


def test_verl_log_probabilities_without_padding(device):
    """Padding removed from ids, log-probabilities of packed logits, and padding restored, by our functions."""
    lengths, response = (9, 4, 12), 3
    mask = left_padding(lengths).to(device)
    ids, logits = integers(3, 12).to(device) * mask, normal(3, 12, VOCABULARY).to(device)
    with operator_calls() as calls:
        packed = torch_functional.log_probs_from_logits_response_rmpad(ids, mask, logits[mask.bool()], response)
    assert calls == {"cross_entropy_forward": 1}
    expected = logits.double().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0][:, -response:]
    eager = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0][:, -response:]
    assert_close("log-probabilities", packed, expected, eager)


def test_verl_padding_functions_are_ours(device):
    from flash_attn import bert_padding

    assert attention_utils._get_attention_functions() == (
        bert_padding.index_first_axis, bert_padding.pad_input, bert_padding.rearrange, bert_padding.unpad_input
    )  # fmt: skip
    mask = left_padding((5, 2, 7)).to(device)
    x = normal(3, 7, 2, 8).to(device).requires_grad_()
    rows, indices, starts, longest, *_ = attention_utils.unpad_input(x, mask)
    assert starts.tolist() == [0, 5, 7, 14]
    assert longest == 7
    flat = attention_utils.rearrange(x, "b s ... -> (b s) ...")
    assert torch.equal(attention_utils.index_first_axis(flat, indices), rows)
    restored = attention_utils.pad_input(hidden_states=rows, indices=indices, batch=3, seqlen=7)
    assert torch.equal(restored, x * mask[..., None, None])
    restored.sum().backward()
    assert torch.equal(x.grad, mask[..., None, None].expand_as(x).float())


@pytest.mark.parametrize("items", [None, 11])
def test_axolotl_cross_entropy_of_llama(items, device, monkeypatch):
    loss_utils = importlib.import_module("transformers.loss.loss_utils")
    monkeypatch.setattr(loss_utils, "fixed_cross_entropy", loss_utils.fixed_cross_entropy)
    trio = decoder("llama", device=device)
    ids = integers(2, 13).to(device)
    labels = ids.masked_fill(ids % 5 == 0, -100)
    options = {} if items is None else {"num_items_in_batch": items}

    def compute(model):
        model.zero_grad()
        loss = model(ids, labels=labels, use_cache=False, **options).loss
        loss.backward()
        return torch.cat((loss.detach().flatten(), *(p.grad.flatten() for p in model.parameters())))

    expected, eager = compute(trio.reference), compute(trio.eager)
    llama_patches.patch_fa_llama_cross_entropy()
    with operator_calls() as calls:
        actual = compute(trio.eager)
    assert calls == LOSS_CALLS
    assert_close("loss and gradients", actual, expected.double(), eager)


def test_axolotl_cross_entropy_of_mistral(device, monkeypatch):
    modeling = importlib.import_module("transformers.models.mistral.modeling_mistral")
    monkeypatch.setattr(modeling, "CrossEntropyLoss", nn.CrossEntropyLoss, raising=False)
    logits, labels = normal(14, VOCABULARY).to(device), integers(14).to(device)
    labels[::4] = -100

    def results(loss_class, dtype):
        x = logits.to(dtype, copy=True).requires_grad_()
        loss = loss_class()(x * 1.0, labels)
        loss.backward()
        return torch.cat((loss.detach().flatten(), x.grad.flatten()))

    expected, eager = (results(modeling.CrossEntropyLoss, dtype) for dtype in (torch.float64, torch.float32))
    mistral_patches.patch_mistral_cross_entropy()
    with operator_calls() as calls:
        actual = results(modeling.CrossEntropyLoss, torch.float32)
    assert calls == INPLACE_LOSS_CALLS
    assert_close("loss and gradient", actual, expected, eager)


class StableLM(nn.Module):
    """The attributes of its attention that axolotl's forward reads; the angles are those of positions."""

    num_heads, num_key_value_heads, num_key_value_groups, head_dim, rotary_ndims = 4, 2, 2, 16, 8
    hidden_size = num_heads * head_dim

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.o_proj = (nn.Linear(64, 64, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(64, 32, bias=False) for _ in range(2))

    def rotary_emb(self, x, seq_len):
        angles = torch.outer(torch.arange(seq_len), 100.0 ** -(torch.arange(0, 8, 2) / 8)).repeat(1, 2).to(x)
        return angles.cos()[None, None], angles.sin()[None, None]


def test_axolotl_attention_of_stablelm(device):
    """Sequences packed in one row, against each one alone through the same function without flash attention."""
    lengths = (5, 8, 3)
    module, x = StableLM().to(device), normal(1, 16, 64).to(device)
    starts = torch.tensor([0, 5, 13, 16], dtype=torch.int32, device=device)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(device)

    def alone(module, x):
        rows = []
        for part in x.split(lengths, dim=1):
            n = part.shape[1]
            mask = part.new_full((1, 1, n, n), -1e30).triu(1)
            rows.append(stablelm_patches.flashattn_attn(module, part, mask, torch.arange(n)[None])[0])
        return torch.cat(rows, dim=1)

    with operator_calls() as calls:
        eager = alone(module, x)
    assert not calls
    with operator_calls() as calls:
        actual = stablelm_patches.flashattn_attn(
            module, x, None, positions, cu_seqlens=starts, max_seqlen=torch.tensor(8)
        )[0]
    assert calls == {"forward packed": 1}
    assert_close("attention", actual, alone(StableLM().to(device).double(), x.double()), eager)


def test_axolotl_attention_of_btlm(device):
    """Heads come before positions, and the scale is one over the head dim."""
    q, k, v = (normal(2, 4, 9, 16, seed=i).to(device) for i in range(3))
    module = SimpleNamespace(attn_scale_power=1.0, scale_attn_weights=True, is_cross_attention=False)
    with operator_calls() as calls:
        out, _ = btlm_patches.flashattn_attn(module, q, k, v)
    assert calls == {"forward": 1}

    def plain(*tensors):
        scores = (tensors[0] @ tensors[1].mT / 16).masked_fill(torch.ones(9, 9, device=device).triu(1).bool(), -1e30)
        return scores.softmax(-1) @ tensors[2]

    assert_close("attention", out, plain(q.double(), k.double(), v.double()), plain(q, k, v))


@pytest.mark.parametrize(("name", "kept"), [("llama", LAYERS), ("mistral", 0)])
def test_axolotl_selective_checkpointing(name, kept, device, monkeypatch):
    """It keeps full attention by the operator's name, and recomputes windows, which it finds in the arguments."""
    model = decoder(name, device=device).flash.train()
    ids = integers(2, 13).to(device)

    def gradients():
        model.zero_grad()
        model(ids, use_cache=False).logits.square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients()
    checkpointing.apply_selective_checkpointing(model)
    model.gradient_checkpointing_enable()
    runs, state = [], ops.state  # which every pass asks for
    monkeypatch.setattr(ops, "state", lambda: runs.append(None) or state())
    assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))
    assert len(runs) == 3 * LAYERS - kept  # forward, forward again and backward
