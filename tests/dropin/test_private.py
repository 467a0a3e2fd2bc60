"""The private operators and the raw calls: numbers, gradients in place, and the calls of context-parallel libraries."""

import inspect

import pytest
import torch
from flash_attn import flash_attn_interface as interface

from flash_attn_plus.testing import Case, arrange, assert_matches_reference, make_inputs

DENSE = Case(batch=2, seqlen_q=37, seqlen_k=53, heads=4, heads_k=2, head_dim=24, right=0)
VARLEN = DENSE._replace(lengths_q=(7, 37, 1), lengths_k=(53, 30, 5))
CASES = {
    "dense": DENSE,
    "dense_window": DENSE._replace(left=8, right=3),
    "dense_dropout": DENSE._replace(dropout_p=0.2),
    "dense_alibi_softcap": DENSE._replace(alibi="heads", softcap=2.0),
    "varlen": VARLEN,
    "varlen_window": VARLEN._replace(left=8, right=3),
    "varlen_dropout": VARLEN._replace(dropout_p=0.2),
    "varlen_trailing": VARLEN._replace(trailing=4),
}


def ring_arguments(operator, call, **given) -> dict:
    """Keyword arguments as a context-parallel library builds them: the signature's defaults, then its own."""
    spec = inspect.getfullargspec(operator._init_fn)
    defaults = dict(zip(spec.args[len(spec.args) - len(spec.defaults or ()) :], spec.defaults or (), strict=True))
    assert "window_size_left" in spec.args
    assert "window_size" not in spec.args
    x = call.inputs
    own = {
        "q": x.q,
        "k": x.k,
        "v": x.v,
        "dropout_p": x.dropout_p,
        "softmax_scale": x.softmax_scale,
        "causal": call.right == 0,
        "window_size_left": call.left,
        "window_size_right": -1 if call.right == 0 else call.right,
        "softcap": x.softcap,
        "alibi_slopes": x.alibi_slopes,
    }
    if "cu_seqlens_q" in spec.args:
        own |= {"cu_seqlens_q": x.cu_seqlens_q, "cu_seqlens_k": x.cu_seqlens_k}
        own |= {"max_seqlen_q": call.max_seqlen_q, "max_seqlen_k": call.max_seqlen_k}
    return defaults | own | given


def operators(call):
    if call.inputs.cu_seqlens_q is None:
        return interface._flash_attn_forward, interface._flash_attn_backward
    return interface._flash_attn_varlen_forward, interface._flash_attn_varlen_backward


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["precise", "bf16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_operators_called_by_keyword(case, dtype, device, precise):
    call = make_inputs(case, dtype or precise, device)
    forward, backward = operators(call)
    outputs = forward(**ring_arguments(forward, call, return_softmax=call.inputs.dropout_p > 0))
    assert len(outputs) == 4
    out, lse, dump, rng_state = outputs
    call = call._replace(inputs=call.inputs._replace(rng_state=rng_state))
    assert (rng_state.dtype, rng_state.shape) == (torch.int64, (2,))
    assert dump.numel() == 0 or case.dropout_p > 0
    wide = [arrange(torch.full_like(x, float("nan")), "sliced") for x in call.inputs[:3]]
    softmax_d = backward(
        **ring_arguments(
            backward, call, dout=call.dout, out=out, softmax_lse=lse, dq=wide[0], dk=wide[1], dv=wide[2],
            deterministic=False, rng_state=rng_state,
        )
    )  # fmt: skip
    is_varlen = case.lengths_q is not None
    total = call.inputs.q.shape[0]
    assert softmax_d.shape == ((4, total + 128 * 3) if is_varlen else (2, 4, 128))
    assert softmax_d.dtype == lse.dtype
    rows = total if is_varlen else case.seqlen_q
    results = {"out": out, "lse": lse, "delta": softmax_d[..., :rows]}
    assert_matches_reference(call, results | dict(zip(("dq", "dk", "dv"), wide, strict=True)))


def test_wrapped_packets_called_by_position(device, precise):
    call = make_inputs(DENSE, precise, device)
    q, k, v = call.inputs[:3]
    numbers = (0.0, call.inputs.softmax_scale, True, -1, -1, 0.0, None)
    out, lse, _, rng_state = interface._wrapped_flash_attn_forward(q, k, v, *numbers, False)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    interface._wrapped_flash_attn_backward(call.dout, q, k, v, out, lse, *grads, *numbers, False, rng_state)
    assert_matches_reference(call, {"out": out, "lse": lse} | dict(zip(("dq", "dk", "dv"), grads, strict=True)))


def test_backward_of_a_softmax_merged_over_blocks(device, precise):
    """Each block's backward gets the merged out and lse; the blocks' gradients add up to the whole one's."""
    call = make_inputs(DENSE._replace(right=-1, seqlen_k=60), precise, device)
    q, k, v = call.inputs[:3]
    numbers = (0.0, call.inputs.softmax_scale, False, -1, -1, 0.0, None)
    whole_out, whole_lse, _, _ = interface._flash_attn_forward(q, k, v, *numbers, False)
    partial = [interface._flash_attn_forward(q, *x, *numbers, False)[:2] for x in blocks(k, v)]
    lse = torch.logaddexp(partial[0][1], partial[1][1])
    out = sum(o * (block_lse - lse).exp().transpose(1, 2)[..., None].to(o.dtype) for o, block_lse in partial)
    torch.testing.assert_close((out, lse), (whole_out, whole_lse))
    dq, dk, dv = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
    for index, (k_block, v_block) in enumerate(blocks(k, v)):
        dq_block, keys = torch.empty_like(q), slice(30 * index, 30 * index + 30)
        interface._flash_attn_backward(
            call.dout, q, k_block, v_block, out, lse, dq_block, dk[:, keys], dv[:, keys], *numbers, False
        )
        dq += dq_block
    assert_matches_reference(call, {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv})


def blocks(k, v):
    return list(zip(k.split(30, 1), v.split(30, 1), strict=True))


def test_gradients_without_buffers(device):
    call = make_inputs(DENSE, torch.float32, device)
    q, k, v = call.inputs[:3]
    numbers = (0.0, call.inputs.softmax_scale, True, -1, -1, 0.0, None)
    out, lse, _, _ = interface._flash_attn_forward(q, k, v, *numbers, False)
    softmax_d = interface._flash_attn_backward(call.dout, q, k, v, out, lse, None, None, None, *numbers, False)
    torch.testing.assert_close(softmax_d[..., :37], (call.dout * out).sum(-1).transpose(1, 2).to(lse.dtype))


def test_zero_tensors_fills_what_no_sequence_covers(device):
    call = make_inputs(VARLEN._replace(trailing=4), torch.float32, device)
    x, lengths = call.inputs, (call.max_seqlen_q, call.max_seqlen_k)
    starts = (x.cu_seqlens_q, x.cu_seqlens_k)
    out, lse, _, _ = interface._flash_attn_varlen_forward(
        x.q, x.k, x.v, *starts, *lengths, 0.0, 0.2, True, zero_tensors=True
    )
    assert not out[-4:].any()
    assert torch.equal(lse[:, -4:], torch.full_like(lse[:, -4:], float("-inf")))
    grads = [torch.full_like(t, 7.0) for t in x[:3]]
    softmax_d = interface._flash_attn_varlen_backward(
        call.dout, x.q, x.k, x.v, out, lse, *grads, *starts, *lengths, 0.0, 0.2, True, -1, -1, 0.0, None, False,
        zero_tensors=True,
    )  # fmt: skip
    assert not any(g[-4:].any() for g in grads)
    assert not softmax_d[:, 45:].any()


@pytest.mark.parametrize("page_size", [0, 16])
def test_varlen_options_of_the_operator(page_size, device, precise):
    """seqused_k with pages, or with leftpad_k; one query a sequence."""
    case = Case(batch=3, seqlen_q=1, seqlen_k=53, heads=4, heads_k=2, head_dim=24, used=(53, 20, 9))
    case = case._replace(page_size=page_size) if page_size else case._replace(leftpad=(3, 0, 8))
    call = make_inputs(case, precise, device)
    x = call.inputs
    q = x.q.flatten(0, 1)
    starts_q, starts_k = (torch.arange(0, n * 3 + 1, n, dtype=torch.int32, device=device) for n in (1, 53))
    k, v = (x.k, x.v) if page_size else (x.k.flatten(0, 1), x.v.flatten(0, 1))
    results = [
        interface._flash_attn_varlen_forward(
            q, k, v, starts_q, starts_k, 1, 53, 0.0, x.softmax_scale, False, block_table=x.block_table,
            leftpad_k=x.leftpad_k, seqused_k=x.seqused_k, **hint,
        )
        for hint in ({}, {"num_splits": 0}, {"num_splits": 2})
    ]  # fmt: skip
    out, lse = results[0][:2]
    for other in results[1:]:
        assert torch.equal(other[0], out)
        assert torch.equal(other[1], lse)
    assert_matches_reference(call, {"out": out.unflatten(0, (3, 1)), "lse": lse.unflatten(1, (3, 1)).transpose(0, 1)})


def test_raw_calls_agree_with_the_operators(device, precise):
    gpu, call = interface.flash_attn_gpu, make_inputs(DENSE, precise, device)
    q, k, v = call.inputs[:3]
    scale = call.inputs.softmax_scale
    buffer = torch.empty_like(q)
    out, lse, dump, rng_state = gpu.fwd(q, k, v, buffer, None, 0.0, scale, True, -1, -1, 0.0, False, None)
    assert out.data_ptr() == buffer.data_ptr()
    expected = interface._flash_attn_forward(q, k, v, 0.0, scale, True, -1, -1, 0.0, None, False)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    assert dump.shape == (0,)
    dq, dk, dv, softmax_d = gpu.bwd(
        call.dout, q, k, v, out, lse, None, None, None, None, 0.0, scale, True, -1, -1, 0.0, False, None, rng_state
    )
    assert softmax_d.shape == (2, 4, 128)
    assert_matches_reference(call, {"out": out, "lse": lse})
    again = [torch.empty_like(x) for x in (q, k, v)]
    interface._flash_attn_backward(
        call.dout, q, k, v, out, lse, *again, 0.0, scale, True, -1, -1, 0.0, None, False, rng_state
    )
    assert all(torch.equal(a, b) for a, b in zip(again, (dq, dk, dv), strict=True))


def test_raw_varlen_calls_with_shared_gradient_buffer(device, precise):
    gpu = interface.flash_attn_gpu
    call = make_inputs(VARLEN._replace(lengths_k=VARLEN.lengths_q, heads_k=4), precise, device)
    x = call.inputs
    lengths = (call.max_seqlen_q, call.max_seqlen_k)
    out, lse, _, rng_state = gpu.varlen_fwd(
        x.q, x.k, x.v, None, x.cu_seqlens_q, x.cu_seqlens_k, None, None, None, None, *lengths, 0.0, x.softmax_scale,
        False, True, -1, -1, 0.0, False, None,
    )  # fmt: skip
    shared = torch.full((x.q.shape[0], 3, *x.q.shape[1:]), float("nan"), dtype=precise, device=device)
    dq, dk, dv, softmax_d = gpu.varlen_bwd(
        call.dout, x.q, x.k, x.v, out, lse, *shared.unbind(1), x.cu_seqlens_q, x.cu_seqlens_k, None, *lengths, 0.0,
        x.softmax_scale, False, True, -1, -1, 0.0, False, None, rng_state,
    )  # fmt: skip
    assert dq.data_ptr() == shared.data_ptr()
    assert softmax_d.shape == (4, x.q.shape[0] + 3 * 128)
    assert_matches_reference(call, {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv})


def test_raw_calls_build_no_graph(device):
    q, k, v = (torch.randn(1, 5, 2, 16, device=device, requires_grad=True) for _ in range(3))
    outputs = interface.flash_attn_gpu.fwd(q, k, v, None, None, 0.0, 0.25, False, -1, -1, 0.0, False, None)
    assert not any(x.requires_grad for x in outputs)
