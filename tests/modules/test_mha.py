"""MHA: projections, rotary embedding, caches and what each option adds, in float64."""

import copy

import pytest
import torch
from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb_torch
from flash_attn.modules.mha import MHA
from flash_attn.utils.generation import InferenceParams
from torch import nn

X = torch.randn(2, 11, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "grouped": {"num_heads_kv": 2, "causal": True},
    "multi-query": {"num_heads_kv": 1},
    "rotary": {"rotary_emb_dim": 16},
    "rotary-part": {"rotary_emb_dim": 8, "causal": True},
    "rotary-interleaved": {"rotary_emb_dim": 16, "rotary_emb_interleaved": True, "rotary_emb_base": 100.0},
    "rotary-grouped": {"rotary_emb_dim": 16, "num_heads_kv": 2, "causal": True},
    "xpos": {"rotary_emb_dim": 16, "rotary_emb_scale_base": 16, "causal": True},
    "no-bias": {"qkv_proj_bias": False, "out_proj_bias": False},
    "scale": {"softmax_scale": 0.7},
    "dwconv": {"dwconv": True, "causal": True},
    "dwconv-grouped": {"dwconv": True, "num_heads_kv": 2},
    "cross": {"cross_attn": True},
    "cross-grouped": {"cross_attn": True, "num_heads_kv": 2, "dwconv": True},
}


def make_mha(**options):
    torch.manual_seed(0)
    return MHA(64, 4, **options).double().eval()


def outputs(module, x=X):
    """Output, and gradients of input and parameters."""
    x = x.clone().requires_grad_()
    out = module(x)
    weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return out, torch.autograd.grad((out * weight).sum(), (x, *module.parameters()))


@pytest.mark.parametrize("name", OPTIONS)
def test_flash_is_plain_forward_and_backward(name):
    torch.testing.assert_close(
        outputs(make_mha(**OPTIONS[name], use_flash_attn=True)), outputs(make_mha(**OPTIONS[name]))
    )


@pytest.mark.parametrize("option", ["fused_bias_fc", "checkpointing"])
@pytest.mark.parametrize("name", OPTIONS)
def test_option_that_changes_no_number(name, option):
    torch.testing.assert_close(outputs(make_mha(**OPTIONS[name], **{option: True})), outputs(make_mha(**OPTIONS[name])))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("heads_k", [4, 2])
def test_against_the_formula(interleaved, heads_k):
    module = make_mha(num_heads_kv=heads_k, rotary_emb_dim=8, rotary_emb_interleaved=interleaved, use_flash_attn=True)
    q, k, v = module.Wqkv(X).split((64, 16 * heads_k, 16 * heads_k), dim=-1)
    q, k, v = (x.unflatten(-1, (-1, 16)) for x in (q, k, v))
    rotary = RotaryEmbedding(8)
    rotary._update_cos_sin_cache(11, X.device, X.dtype)
    q, k = (apply_rotary_emb_torch(x, rotary._cos_cached, rotary._sin_cached, interleaved) for x in (q, k))
    k, v = (x.repeat_interleave(4 // heads_k, dim=2) for x in (k, v))
    weights = torch.einsum("bthd,bshd->bhts", q, k).mul(0.25).softmax(-1)
    expected = module.out_proj(torch.einsum("bhts,bshd->bthd", weights, v).flatten(2))
    torch.testing.assert_close(module(X), expected)


def test_names_of_the_parameters():
    def shapes(**options):
        return {name: tuple(x.shape) for name, x in make_mha(**options).state_dict().items()}

    out = {"out_proj.weight": (64, 64), "out_proj.bias": (64,)}
    assert shapes(num_heads_kv=2, rotary_emb_dim=8) == {"Wqkv.weight": (128, 64), "Wqkv.bias": (128,)} | out
    cross = {"Wq.weight": (64, 64), "Wq.bias": (64,), "Wkv.weight": (128, 64), "Wkv.bias": (128,)} | out
    assert shapes(cross_attn=True) == cross
    assert shapes(dwconv=True).keys() >= {"dwconv_qkv.weight", "dwconv_qkv.bias"}
    assert shapes(dwconv=True, num_heads_kv=2).keys() >= {"dwconv_q.weight", "dwconv_kv.bias"}


@pytest.mark.parametrize("options", [{"causal": True}, {"causal": True, "num_heads_kv": 2}])
def test_convolution_looks_back_only(options):
    module = make_mha(dwconv=True, **options)
    later = X.clone()
    later[:, 6:] += 1.0
    torch.testing.assert_close(module(later)[:, :6], module(X)[:, :6])
    with torch.no_grad():  # a kernel of one weight at distance two delays by two tokens
        for name, conv in module.named_modules():
            if name.startswith("dwconv"):
                conv.weight.copy_(torch.tensor([1.0, 0.0, 0.0]).expand_as(conv.weight))
                conv.bias.zero_()
    plain = make_mha(qkv_proj_bias=False, **options)
    plain.load_state_dict(module.state_dict(), strict=False)
    nn.init.zeros_(module.Wqkv.bias)
    delayed = torch.cat((torch.zeros_like(X[:, :2]), X[:, :-2]), dim=1)
    torch.testing.assert_close(module(X), plain(delayed))


@pytest.mark.parametrize("use_flash_attn", [False, True])
@pytest.mark.parametrize("fused_bias_fc", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_heads_kv": 2}, {"cross_attn": True}])
def test_returned_residual_is_the_input(use_flash_attn, fused_bias_fc, options):
    module = make_mha(return_residual=True, fused_bias_fc=fused_bias_fc, use_flash_attn=use_flash_attn, **options)
    plain = make_mha(**options)

    class Sum(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            result = self.inner(x)
            return result[0] + 2 * result[1] if isinstance(result, tuple) else result + 2 * x

    torch.testing.assert_close(outputs(Sum(module)), outputs(Sum(plain)))


@pytest.mark.parametrize("use_flash_attn", [False, True])
def test_cross_attention_over_another_sequence(use_flash_attn):
    module = make_mha(cross_attn=True, use_flash_attn=use_flash_attn)
    other = torch.randn(2, 5, 64, dtype=torch.float64)
    q, (k, v) = module.Wq(X), module.Wkv(other).chunk(2, dim=-1)
    q, k, v = (x.unflatten(-1, (4, 16)) for x in (q, k, v))
    weights = torch.einsum("bthd,bshd->bhts", q, k).mul(0.25).softmax(-1)
    expected = module.out_proj(torch.einsum("bhts,bshd->bthd", weights, v).flatten(2))
    torch.testing.assert_close(module(X, x_kv=other), expected)
    torch.testing.assert_close(module(X, x_kv=other, mixer_subset=slice(2, 4)), expected[:, 2:4])
    torch.testing.assert_close(module(X, mixer_subset=slice(0, 1)), module(X)[:, :1])


@pytest.mark.parametrize(
    "options", [{}, {"num_heads_kv": 2}, {"causal": True, "num_heads_kv": 1}, {"cross_attn": True}]
)
def test_packed_sequences(options):
    lengths = torch.tensor([11, 4])
    mask = torch.arange(11) < lengths[:, None]
    cu_seqlens = torch.tensor([0, 11, 15], dtype=torch.int32)
    kwargs = {"cu_seqlens_k": cu_seqlens, "max_seqlen_k": 11} if "cross_attn" in options else {}
    packed = make_mha(**options, use_flash_attn=True)(X[mask], cu_seqlens=cu_seqlens, max_seqlen=11, **kwargs)
    if options.get("causal"):
        expected = torch.cat([make_mha(**options)(X[n : n + 1, :length])[0] for n, length in enumerate(lengths)])
    else:
        expected = make_mha(**options)(X, key_padding_mask=mask)[mask]
    torch.testing.assert_close(packed, expected)


@pytest.mark.parametrize("use_flash_attn", [False, True])
@pytest.mark.parametrize("name", ["causal", "grouped", "rotary-grouped", "rotary-part", "xpos"])
def test_decoding_step_by_step_is_the_whole_sequence(name, use_flash_attn):
    module = make_mha(**OPTIONS[name] | {"causal": True}, use_flash_attn=use_flash_attn, layer_idx=3)
    whole = module(X)
    for chunks in ((4, 1, 1, 5), (1, 10), (11,)):
        params, out = InferenceParams(max_seqlen=16, max_batch_size=3, batch_size_offset=1), []
        for chunk in X.split(chunks, dim=1):
            with torch.no_grad():
                out.append(module(chunk, inference_params=params))
            params.seqlen_offset += chunk.shape[1]
        torch.testing.assert_close(torch.cat(out, dim=1), whole)
        cache = params.key_value_memory_dict[3]
        assert cache.shape == (3, 16, 2, module.num_heads_kv, 16)
        assert cache.shape == module.allocate_inference_cache(3, 16).shape


def test_lengths_of_each_sample():
    """Sequences of different lengths decode together; a window and ALiBi slopes see each one's own positions."""
    for options in ({"rotary_emb_dim": 16}, {"rotary_emb_dim": 8}, {"use_alibi": True}, {"window_size": (3, 0)}):
        module = make_mha(causal=True, use_flash_attn=True, layer_idx=0, **options)
        lengths = [7, 3]
        cache = module.allocate_inference_cache(2, 16)
        for n, length in enumerate(lengths):
            params = InferenceParams(16, 1, key_value_memory_dict={0: cache[n : n + 1]})
            with torch.no_grad():
                module(X[n : n + 1, :length], inference_params=params)
        # Another sequence lies in front of them in the cache.
        cache = torch.cat((torch.full_like(cache[:1], torch.nan), cache))
        params = InferenceParams(16, 3, seqlen_offset=7, batch_size_offset=1, key_value_memory_dict={0: cache})
        params.lengths_per_sample = torch.tensor([1, *lengths], dtype=torch.int32)
        step = torch.stack([X[n, length : length + 2] for n, length in enumerate(lengths)])
        with torch.no_grad():
            out = module(step, inference_params=params)
            for n, length in enumerate(lengths):
                torch.testing.assert_close(out[n], module(X[n : n + 1, : length + 2])[0, -2:])


def test_moving_a_module_keeps_its_angles():
    module = make_mha(rotary_emb_dim=16)
    moved = copy.deepcopy(module).bfloat16().double()
    moved.load_state_dict(module.state_dict())
    torch.testing.assert_close(moved(X), module(X))


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({"num_heads_kv": 3}, None, "num_heads_kv"),
        ({"use_alibi": True}, None, "use_flash_attn"),
        ({"window_size": (2, 2)}, None, "use_flash_attn"),
        ({"cross_attn": True, "rotary_emb_dim": 8}, None, "cross_attn"),
        ({}, {"cu_seqlens": torch.tensor([0, 2]).int(), "max_seqlen": 2}, "use_flash_attn"),
        ({"use_flash_attn": True}, {"cu_seqlens": torch.tensor([0, 2]).int()}, "max_seqlen"),
        ({"use_flash_attn": True}, {"key_padding_mask": torch.ones(2, 11).bool()}, "key_padding_mask"),
        (
            {"use_flash_attn": True, "rotary_emb_dim": 8},
            {"cu_seqlens": torch.tensor([0, 2]).int(), "max_seqlen": 2},
            "rotary",
        ),
        (
            {"use_flash_attn": True, "dwconv": True},
            {"cu_seqlens": torch.tensor([0, 2]).int(), "max_seqlen": 2},
            "dwconv",
        ),
        ({}, {"x_kv": X}, "cross_attn"),
        ({}, {"mixer_subset": slice(0, 1)}, "cross_attn"),
        ({}, {"inference_params": InferenceParams(16, 2)}, "layer_idx"),
        ({"cross_attn": True}, {"inference_params": InferenceParams(16, 2)}, "cross_attn"),
    ],
)
def test_what_does_not_go_together_is_refused(options, call, message):
    if call is None:
        with pytest.raises(AssertionError, match=message):
            make_mha(**options)
        return
    module = make_mha(**options)
    with pytest.raises(AssertionError, match=message):
        module(X, **call)


@pytest.mark.parametrize("heads_k", [1, 2])
def test_padding_leaves_the_diagonal_of_grouped_heads_in_place(heads_k):
    module, length = make_mha(num_heads_kv=heads_k, causal=True), 7
    mask = torch.arange(X.shape[1]) < length
    padded = module(X, key_padding_mask=mask.expand(2, -1))
    assert torch.equal(module(X, key_padding_mask=mask.expand(2, -1).long()), padded)
    torch.testing.assert_close(padded[:, :length], module(X[:, :length]))
