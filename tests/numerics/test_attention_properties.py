"""What holds for every backend beyond closeness: empty rows, repeatability, merged softmax, strides, autograd."""

import pytest
import torch
from cases import cache, crossed, dense, varlen
from serving import BACKENDS, served

from flash_attn_plus import attention, attention_with_kvcache, use_backend
from flash_attn_plus.testing import (
    assert_close,
    assert_matches_reference,
    make_inputs,
    run_backward,
    run_engine,
    run_forward,
    run_reference,
)


def only(names, *families):
    """The named cases of the families."""
    names = names.split()
    return lambda size: {name: case for make in families for name, case in make(size).items() if name in names}


@served(only("causal_tall window_both_tall window_zero_tall", dense))
def test_rows_without_keys(backend, case, dtype, device):
    call = make_inputs(case, dtype, device)
    with use_backend(backend):
        results = run_engine(call, with_gradients=True)
    empty = case.seqlen_q - case.seqlen_k - case.right
    assert empty > 0
    assert (results["out"][:, :empty] == 0).all()
    assert (results["lse"][..., :empty] == float("inf")).all()
    assert (results["dq"][:, :empty] == 0).all()
    assert results["lse"][..., empty:].isfinite().all()


@served(
    only(
        "full causal causal_tall mqa window_both alibi dropout softcap varlen_causal used paged_19",
        dense,
        varlen,
        cache,
    )
)
def test_results_repeat_bitwise(backend, case, dtype, device):
    call = make_inputs(case, dtype, device)
    with use_backend(backend):
        first, second = (run_engine(call, with_gradients=case.has_backward) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@served(only("full latent_heads softcap", dense))
def test_backward_under_a_merged_softmax(backend, case, dtype, device):
    """Given out and lse over all keys, the gradients of each half of the keys are those of the whole."""
    call = make_inputs(case, dtype, device)
    expected, eager = (run_reference(call, d, with_gradients=True) for d in (torch.float64, dtype))
    half = case.seqlen_k // 3
    with use_backend(backend):
        whole = run_forward(call)
        grads = []
        for keys in (slice(0, half), slice(half, None)):
            inputs = call.inputs._replace(k=call.inputs.k[:, keys], v=call.inputs.v[:, keys])
            grads.append(run_backward(call._replace(inputs=inputs), whole["out"], whole["lse"]))
    for name in ("dk", "dv"):
        joined = torch.cat([part[name] for part in grads], 1)
        assert_close(name, joined, expected[name], eager[name])
    assert_close("dq", grads[0]["dq"].float() + grads[1]["dq"].float(), expected["dq"], eager["dq"])


@served(only("causal", dense), (torch.float32,))
def test_gradient_that_arrives_with_stride_zero(backend, case, dtype, device):
    call = make_inputs(case, dtype, device)
    q, k, v = (x.clone().requires_grad_() for x in call.inputs[:3])
    with use_backend(backend):
        attention(q, k, v, causal=True).sum().backward()
        call = call._replace(dout=torch.ones_like(call.dout))
        direct = run_engine(call, with_gradients=True)
    for x, name in ((q, "dq"), (k, "dk"), (v, "dv")):
        assert torch.equal(x.grad, direct[name])


@served(only("causal mqa value_wider varlen_causal", dense, varlen), (torch.float32, torch.bfloat16))
def test_public_call_differentiates_out_and_lse(backend, case, dtype, device):
    call = make_inputs(case, dtype, device)
    x = call.inputs
    q, k, v = (t.clone().requires_grad_() for t in x[:3])
    sequences = {}
    if x.cu_seqlens_q is not None:
        sequences = {name: getattr(x, name) for name in ("cu_seqlens_q", "cu_seqlens_k")}
        sequences |= {"max_seqlen_q": call.max_seqlen_q, "max_seqlen_k": call.max_seqlen_k}
    with use_backend(backend):
        out, lse = attention(q, k, v, causal=True, return_lse=True, **sequences)
        torch.autograd.backward((out, lse), (call.dout, call.dlse))
        direct = run_engine(call, with_gradients=True, with_dlse=True)
    for got, name in ((out, "out"), (lse, "lse"), (q.grad, "dq"), (k.grad, "dk"), (v.grad, "dv")):
        assert torch.equal(got, direct[name])


@served(only("varlen_causal used paged_19 alibi_batch dropout", dense, varlen, cache), (torch.float32,))
def test_call_of_equal_shapes_reads_its_own_contents(backend, case, dtype, device):
    """What a first call worked out may serve a second one, but never its lengths, tables, slopes or seeds."""
    first, second = (make_inputs(case, dtype, device, seed=seed) for seed in (0, 1))
    x = second.inputs
    if x.cu_seqlens_q is not None:
        other = case._replace(lengths_q=case.lengths_q[::-1], lengths_k=case.lengths_k[::-1])
        second = make_inputs(other, dtype, device, seed=1)
    elif x.seqused_k is not None:
        second = make_inputs(case._replace(used=case.used[::-1]), dtype, device, seed=1)
    with use_backend(backend):
        run_engine(first, with_gradients=case.has_backward)
        results = run_engine(second, with_gradients=case.has_backward)
    assert_matches_reference(second, results)


GRADCHECK = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "softcap": {"softcap": 2.0, "causal": True},
    "alibi": {"alibi_slopes": (0.3, 0.1), "causal": True},
    "dropout": {"dropout_p": 0.4},
    "negative_scale": {"softmax_scale": -0.7, "causal": True},
}


@pytest.mark.parametrize("options", GRADCHECK.values(), ids=GRADCHECK)
@pytest.mark.parametrize("lengths", [(3, 5), (5, 3)], ids=["wide", "tall"])
def test_gradcheck(options, lengths, device):
    """Against finite differences, in float64, which the torch backend alone serves."""
    random = torch.Generator().manual_seed(1)
    shapes = (1, lengths[0], 2, 4), (1, lengths[1], 1, 4), (1, lengths[1], 1, 3)
    q, k, v = (torch.randn(s, generator=random, dtype=torch.float64).to(device).requires_grad_() for s in shapes)
    options = dict(options)
    if "alibi_slopes" in options:
        options["alibi_slopes"] = torch.tensor(options["alibi_slopes"], device=device)

    def call(q, k, v):
        torch.manual_seed(3)  # the same dropout bits at every evaluation
        out, lse = attention(q, k, v, return_lse=True, **options)
        return out, lse.masked_fill(lse.isinf(), 0.0)

    with use_backend("torch"):
        assert torch.autograd.gradcheck(call, (q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_backward_serves_any_forward(backend, device):
    """Softmax statistics and dropout bits mean the same to every backend."""
    for name in ("causal", "dropout", "varlen_alibi"):
        case = (dense("small") | varlen("small"))[name]
        call = make_inputs(case, torch.float32, device)
        other = next(b for b in BACKENDS if b != backend)
        with use_backend(other):
            forward = run_forward(call)
        with use_backend(backend):
            grads = run_backward(call, **forward)
        expected, eager = (run_reference(call, d, with_gradients=True) for d in (torch.float64, torch.float32))
        for key in ("dq", "dk", "dv"):
            assert_close(key, grads[key], expected[key], eager[key])


def test_crossed_names_are_unique_in_every_size():
    assert len(crossed("large")) == 240
    assert 0 < len(crossed("small")) < len(crossed("medium")) < 240


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_that_are_negated_when_read_are_negated(backend, device):
    """The imaginary part of a conjugate holds the numbers without their sign, which only PyTorch's operators know."""
    x, weight = torch.randn(2, 1, 5, 2, 16, device=device)
    negated = torch.complex(x, x).conj().imag
    assert negated.is_neg()
    caches = [torch.zeros(1, 6, 2, 16, device=device) for _ in range(2)]
    q = x.clone().requires_grad_()
    with use_backend(backend):
        assert torch.equal(attention(negated, x, x), attention(-x, x, x))
        out = attention(q, x, x)
        gradients = [
            torch.autograd.grad(out, q, dout, retain_graph=True)[0]
            for dout in (torch.complex(weight, weight).conj().imag, -weight)
        ]
        attention_with_kvcache(x, *caches, negated, x, cache_seqlens=0)
    assert torch.equal(*gradients)
    assert torch.equal(caches[0][:, :5], -x)
