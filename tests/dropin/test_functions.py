"""The six public attention functions: results, gradients, arities and layouts."""

import flash_attn
import pytest
import torch
from flash_attn import flash_attn_interface as interface

from flash_attn_plus.testing import Case, assert_matches_reference, make_inputs

FUNCTIONS = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
]
BASE = Case(batch=3, seqlen_q=37, seqlen_k=53, heads=4, heads_k=2, head_dim=24)
CASES = {
    "full": BASE,
    "causal": BASE._replace(right=0),
    "window": BASE._replace(left=9, right=4),
    "causal_window": BASE._replace(left=5, right=0),
    "head_dim_59": BASE._replace(head_dim=59, right=0),
    "softcap": BASE._replace(softcap=2.0, q_factor=3.0),
    "alibi": BASE._replace(alibi="batch", right=0),
    "scale": BASE._replace(softmax_scale=0.3),
    "dropout": BASE._replace(dropout_p=0.17),
    "dropout_causal": BASE._replace(dropout_p=0.5, right=0),
    "taller_than_wide": BASE._replace(seqlen_q=53, seqlen_k=20, right=0),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_and_gradients(name, case, invoke):
    made = invoke(name, case)
    assert_matches_reference(made.call, made.results())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("case", ["causal", "dropout", "alibi"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_half_precision(name, case, dtype, invoke):
    made = invoke(name, CASES[case], dtype)
    results = made.results()
    assert {x.dtype for key, x in results.items() if key != "lse"} == {dtype}
    assert results["lse"].dtype == torch.float32
    assert_matches_reference(made.call, results)


@pytest.mark.parametrize("name", ["flash_attn_func", "flash_attn_varlen_func"])
def test_float32(name, invoke):
    made = invoke(name, CASES["dropout"], torch.float32)
    assert_matches_reference(made.call, made.results())


@pytest.mark.parametrize("layout", ["packed", "transposed", "sliced", "expanded"])
@pytest.mark.parametrize("name", ["flash_attn_func", "flash_attn_varlen_func"])
def test_strides(name, layout, invoke):
    made = invoke(name, CASES["causal"]._replace(layout=layout))
    assert_matches_reference(made.call, made.results())


def test_last_stride_other_than_one(invoke):
    made = invoke("flash_attn_func", CASES["causal"])
    turned = [x.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_() for x in made.leaves]
    expected = made.results()
    out = flash_attn.flash_attn_func(*turned, **made.options)
    dout = made.call.dout.transpose(1, 3).contiguous().transpose(1, 3)
    torch.testing.assert_close(out, expected["out"])
    for grad, name in zip(torch.autograd.grad(out, turned, dout), ("dq", "dk", "dv"), strict=True):
        torch.testing.assert_close(grad, expected[name])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_same_numbers_without_gradients(name, invoke):
    made = invoke(name, CASES["causal"])
    expected = made.results()["out"]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = made()
        assert not out.requires_grad
        assert torch.equal(out, expected)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("has_grad", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_arities(name, has_grad, dropout_p, invoke):
    made = invoke(name, BASE._replace(dropout_p=dropout_p))
    q, call = made.call.inputs.q, made.call
    with torch.set_grad_enabled(has_grad):
        out = made()
        triple = made(return_attn_probs=True)
    assert isinstance(out, torch.Tensor)
    assert isinstance(triple, tuple)
    assert len(triple) == 3
    _, lse, dump = triple
    assert torch.equal(triple[0], out)
    assert out.requires_grad == has_grad
    assert out.shape == (*q.shape[:-1], call.inputs.v.shape[-1])
    is_varlen = "varlen" in name
    assert lse.shape == ((q.shape[1], q.shape[0]) if is_varlen else (q.shape[0], q.shape[2], q.shape[1]))
    assert dump.dtype == q.dtype
    assert dump.shape == ((3, q.shape[-2], 128, 128) if dropout_p else (0,))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_of_lse_and_dump_are_discarded(name, invoke):
    made = invoke(name, BASE._replace(dropout_p=0.2))
    out, lse, dump = made(return_attn_probs=True)
    expected = torch.autograd.grad(out, made.leaves, made.call.dout, retain_graph=True)
    total = (out * made.call.dout).sum() + lse.nan_to_num(posinf=0.0).sum() + dump.sum()
    for grad, wanted in zip(torch.autograd.grad(total, made.leaves), expected, strict=True):
        assert torch.equal(grad, wanted)


def test_window_size_may_be_a_tensor_or_a_list(invoke):
    made = invoke("flash_attn_func", CASES["window"])
    expected = made()
    assert torch.equal(made(window_size=torch.tensor([9, 4])), expected)
    assert torch.equal(made(window_size=[9, 4]), expected)


def test_causal_overrides_the_right_bound_only(invoke):
    made = invoke("flash_attn_func", CASES["causal_window"])
    assert torch.equal(made(causal=True, window_size=(5, 7)), made(causal=False, window_size=(5, 0)))
    assert torch.equal(made(causal=True, window_size=(-1, -1)), made(causal=False, window_size=(-1, 0)))


@pytest.mark.parametrize("name", ["flash_attn_varlen_func", "flash_attn_varlen_qkvpacked_func"])
def test_maximal_lengths_may_be_tensors_and_larger(name, invoke):
    made = invoke(name, CASES["causal"])
    expected = made()
    made.sequences = [torch.tensor(x, dtype=torch.int32) if isinstance(x, int) else x for x in made.sequences]
    assert torch.equal(made(), expected)
    made.sequences = [x + 70 if x.ndim == 0 else x for x in made.sequences]
    torch.testing.assert_close(made(), expected)


def test_gradients_reach_only_what_asks_for_them(invoke):
    made = invoke("flash_attn_func", CASES["causal"])
    q, k, v = made.leaves
    expected = torch.autograd.grad(made(), (q, k, v), made.call.dout)
    out = flash_attn.flash_attn_func(q.detach(), k, v.detach(), causal=True)
    assert torch.equal(torch.autograd.grad(out, k, made.call.dout)[0], expected[1])


def test_dropout_follows_the_seed(invoke):
    made = invoke("flash_attn_func", CASES["dropout"])
    first = made()
    assert torch.equal(made(), first)
    assert not torch.equal(flash_attn.flash_attn_func(*made.leaves, **made.options), first)


def test_trailing_rows_are_left_alone(invoke):
    made = invoke("flash_attn_varlen_func", CASES["causal"]._replace(lengths_q=(5, 9), lengths_k=(8, 20), trailing=3))
    assert_matches_reference(made.call, made.results())


@pytest.mark.parametrize("deterministic", [False, True])
def test_key_gradients_are_repeatable(deterministic, invoke):
    made = invoke("flash_attn_func", CASES["dropout"], torch.bfloat16)
    first, second = made.results(deterministic=deterministic), made.results(deterministic=deterministic)
    names = ("dq", "dk", "dv") if deterministic else ("dk", "dv")
    assert all(torch.equal(first[name], second[name]) for name in names)


@pytest.mark.parametrize("has_grad", [False, True])
@pytest.mark.parametrize("page_size", [16, 256])
def test_block_table(page_size, has_grad, device, precise):
    paged = make_inputs(
        Case(batch=3, seqlen_q=9, seqlen_k=53, heads=4, heads_k=2, head_dim=24, right=0, page_size=page_size,
             used=(53, 20, 1)),
        precise, device,
    )  # fmt: skip
    x = paged.inputs
    starts = torch.tensor([0, 53, 73, 74], dtype=torch.int32, device=device)
    packed = torch.arange(0, 28, 9, dtype=torch.int32, device=device)
    q = x.q.flatten(0, 1).clone().requires_grad_(has_grad)
    out, lse, _ = interface.flash_attn_varlen_func(
        q, x.k, x.v, packed, starts, 9, 53, causal=True, return_attn_probs=True, block_table=x.block_table
    )
    results = {"out": out.detach().unflatten(0, (3, 9)), "lse": lse.detach().unflatten(1, (3, 9)).transpose(0, 1)}
    assert_matches_reference(paged, results)
    if has_grad:
        with pytest.raises(RuntimeError, match="block_table has no backward"):
            out.sum().backward()


@pytest.mark.parametrize("has_keys", [True, False])
def test_rows_without_keys(has_keys, invoke):
    made = invoke("flash_attn_func", BASE._replace(seqlen_q=40, seqlen_k=8 if has_keys else 0, right=0))
    results = made.results()
    blind = slice(0, 32 if has_keys else 40)
    assert torch.equal(results["lse"][..., blind], torch.full_like(results["lse"][..., blind], float("inf")))
    assert not results["out"][:, blind].any()
    assert not results["dq"][:, blind].any()
    assert_matches_reference(made.call, results)


def test_sequences_without_keys_or_queries(invoke):
    made = invoke("flash_attn_varlen_func", CASES["causal"]._replace(lengths_q=(5, 0, 4), lengths_k=(0, 6, 9)))
    assert_matches_reference(made.call, made.results())


def test_no_keys_at_all(device):
    q = torch.randn(7, 2, 16, device=device)
    k = torch.randn(0, 2, 16, device=device)
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 3, 7], [0, 0, 0]))
    out, lse, _ = flash_attn.flash_attn_varlen_func(q, k, k, cu_q, cu_k, 4, 0, return_attn_probs=True)
    assert not out.any()
    assert bool((lse == float("inf")).all())


def test_no_queries(device):
    q = torch.randn(2, 0, 2, 16, device=device, requires_grad=True)
    k, v = (torch.randn(2, 5, 2, 16, device=device, requires_grad=True) for _ in range(2))
    out = flash_attn.flash_attn_func(q, k, v)
    assert out.shape == (2, 0, 2, 16)
    assert not any(g.any() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def large_magnitudes(length, invoke):
    return invoke("flash_attn_func", BASE._replace(seqlen_q=length, seqlen_k=length, right=0, q_factor=15.0))


@pytest.mark.parametrize("length", [2, 5, 17])
def test_large_magnitudes_give_finite_gradients(length, invoke):
    made = large_magnitudes(length, invoke)
    assert_matches_reference(made.call, made.results())


def test_a_single_key_leaves_only_rounding_in_dq_and_dk(invoke):
    """Both hold a difference of two equal sums over the head dim, of which plain PyTorch rounds one alike by luck."""
    made = large_magnitudes(1, invoke)
    x, found = made.call.inputs, made.results()
    assert_matches_reference(made.call, {name: found[name] for name in ("out", "lse", "dv")})
    group = x.q.shape[2] // x.k.shape[2]
    terms = (made.call.dout * x.v.repeat_interleave(group, 2)).float().abs().sum(-1).max()
    rounding = torch.finfo(torch.float32).eps * x.softmax_scale * terms
    assert found["dq"].abs().max() <= rounding * x.k.abs().max()
    assert found["dk"].abs().max() <= group * rounding * x.q.abs().max()


def test_autograd_classes_take_their_positional_order(invoke):
    made = invoke("flash_attn_func", CASES["causal"])
    expected = made.results()
    args = (0.0, None, True, (-1, -1), 0.0, None, False, False)
    out = interface.FlashAttnFunc.apply(*made.leaves, *args, True)
    assert torch.equal(out, expected["out"])
    assert torch.equal(torch.autograd.grad(out, made.leaves[0], made.call.dout)[0], expected["dq"])
    silent = interface.FlashAttnFunc.apply(*made.leaves, *args, False)
    assert torch.equal(silent, expected["out"])
    with pytest.raises(RuntimeError, match="is_grad_enabled"):
        silent.sum().backward()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_number_of_gradients(name, invoke, golden):
    made = invoke(name, CASES["causal"])
    out = made()  # kept alive: the node saves it
    node = out.grad_fn
    cls = node._forward_cls
    assert len(cls.backward(node, made.call.dout)) == golden["gradients"][cls.__name__]
    assert golden["gradients"][cls.__name__] == len(golden["autograd"][cls.__name__]) - 1
