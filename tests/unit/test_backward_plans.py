"""A backward pass like an earlier one is neither checked nor chosen anew, and nothing else changes."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

from flash_attn_plus import attention, env, ops, use_backend
from flash_attn_plus.errors import InvalidArgument, NoBackend
from flash_attn_plus.selection import get
from flash_attn_plus.testing import Case, arrange, assert_matches_reference, make_inputs, run_backward, run_engine

CASE = Case(batch=2, seqlen_q=9, seqlen_k=13, heads=4, heads_k=2, head_dim=16, right=0)
CASES = {
    "dense": CASE,
    "window": CASE._replace(left=3, right=2),
    "softcap": CASE._replace(softcap=5.0),
    "alibi": CASE._replace(alibi="batch"),
    "dropout": CASE._replace(dropout_p=0.3),
    "packed": CASE._replace(lengths_q=(5, 9), lengths_k=(13, 4), trailing=2),
    "no_keys": CASE._replace(seqlen_k=0, right=-1),
    "sliced": CASE._replace(layout="sliced"),
    "expanded": CASE._replace(layout="expanded"),
}


@pytest.fixture(autouse=True)
def no_plans(monkeypatch):
    """Every test begins with none."""
    monkeypatch.setattr(ops, "_backward_plans", {})


def arguments(case: Case = CASE, dtype: torch.dtype = torch.float32) -> dict:
    """dout, q, k, v, out, lse, dlse, dq, dk and dv by name, and the options in "rest"."""
    call = make_inputs(case, dtype)
    x, forward = call.inputs, run_engine(call, with_gradients=False)
    rest = (
        x.cu_seqlens_q, x.cu_seqlens_k, call.max_seqlen_q, call.max_seqlen_k, None, None, None, x.alibi_slopes,
        x.rng_state, x.dropout_p, x.softmax_scale, call.left, call.right, x.softcap, False,
    )  # fmt: skip
    grads = {f"d{n}": torch.full_like(t, torch.nan) for n, t in zip("qkv", x[:3], strict=True)}
    return {"dout": call.dout, "q": x.q, "k": x.k, "v": x.v, **forward, "dlse": None, **grads, "rest": rest}


def differentiate(given: dict) -> tuple[Tensor, ...]:
    """Delta and the filled gradients."""
    *tensors, rest = given.values()
    return ops.backward(*tensors, *rest), *tensors[-3:]


@pytest.mark.parametrize("with_dlse", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_later_calls_with_other_contents_are_right(name, with_dlse):
    for seed in range(3):
        call = make_inputs(CASES[name], torch.float32, seed=seed)
        assert_matches_reference(call, run_engine(call, with_gradients=True, with_dlse=with_dlse), with_dlse=with_dlse)
    assert len(ops._backward_plans) == 1


def test_a_known_call_is_neither_checked_nor_chosen(monkeypatch):
    given = arguments()
    first = [x.clone() for x in differentiate(given)]
    for name in ("gather_inputs", "_check_gradients", "describe", "choose"):
        monkeypatch.setattr(ops, name, None)
    assert all(map(torch.equal, differentiate(given), first))


def test_every_layout_of_what_arrives_is_read_right():
    given = arguments(CASE._replace(right=-1))
    given["dlse"] = torch.randn_like(given["lse"])
    expected = [x.clone() for x in differentiate(given)]
    for name in ("dout", "out", "lse", "dlse"):
        turned = given[name].transpose(-1, -2).contiguous().transpose(-1, -2)
        assert not turned.is_contiguous()
        assert all(map(torch.equal, differentiate({**given, name: turned}), expected)), name
    q, k, v = (given[n].clone().requires_grad_() for n in "qkv")
    for _ in range(2):
        grads = torch.autograd.grad(attention(q, k, v).sum(), (q, k, v))
        dense = torch.autograd.grad(attention(q, k, v), (q, k, v), torch.ones_like(q))
        assert all(map(torch.equal, grads, dense))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("dout", lambda x: x.double(), "query and dout must have the same dtype"),
        ("dout", lambda x: x[:1], "dout must have shape"),
        ("out", lambda x: x.half(), "query and out must have the same dtype"),
        ("out", lambda x: x[..., :8], "out must have shape"),
        ("lse", lambda x: x[..., :8], "softmax_lse must have shape"),
        ("lse", lambda x: x.double(), "softmax_lse must have dtype torch.float32"),
        ("lse", lambda x: x.to("meta"), "softmax_lse must be on the device of q, cpu, not on meta"),
        ("dout", lambda x: x.to("meta"), "dout must be on the device of q"),
        ("dv", lambda x: x.to("meta"), "dv must be on the device of q"),
        ("dk", lambda x: x.half(), "query and dk must have the same dtype"),
        ("dv", lambda x: x[:, :8], "dv must have shape"),
        ("dq", lambda x: x.transpose(1, 3).contiguous().transpose(1, 3), "contiguous last dimension"),
        ("k", lambda x: x[:, :, :1], "v must have shape"),
        ("v", lambda x: x.half(), "query and v must have the same dtype"),
    ],
)
def test_bad_arguments_are_named_after_good_ones(name, change, words):
    given = arguments()
    differentiate(given)
    with pytest.raises(InvalidArgument, match=words):
        differentiate({**given, name: change(given[name])})


@pytest.mark.parametrize(
    ("index", "value", "words"),
    [
        (4, torch.ones(2, dtype=torch.int32), "have no backward"),
        (7, torch.ones(3), "alibi_slopes must have shape"),
        (9, 1.5, "p_dropout must be in"),
        (10, float("nan"), "softmax_scale must be finite"),
        (13, float("inf"), "softcap must be finite"),
    ],
)
def test_bad_options_are_named_every_time(index, value, words):
    given = arguments()
    differentiate(given)
    rest = [*given["rest"]]
    rest[index] = value
    for _ in range(2):
        with pytest.raises(InvalidArgument, match=words):
            differentiate({**given, "rest": rest})


def test_a_switch_takes_effect_at_the_next_call(monkeypatch):
    given = arguments()
    differentiate(given)
    with use_backend("cuda"), pytest.raises(NoBackend):
        differentiate(given)
    monkeypatch.setenv(env.BACKEND, "cuda")
    with pytest.raises(NoBackend):
        differentiate(given)
    monkeypatch.delenv(env.BACKEND)
    differentiate(given)


def test_the_backend_hears_of_determinism_and_of_a_gradient_of_the_lse(monkeypatch):
    heard, given = [], arguments()
    monkeypatch.setattr(type(get("torch")), "backward", lambda _, p, *x: heard.append((p.is_deterministic, p.has_dlse)))
    with_dlse = {**given, "dlse": given["lse"]}
    for _ in range(2):
        differentiate(given)
        differentiate(with_dlse)
        differentiate({**given, "rest": (*given["rest"][:-1], True)})
        torch.use_deterministic_algorithms(True)
        try:
            differentiate(given)
        finally:
            torch.use_deterministic_algorithms(False)
    assert heard == [(False, False), (False, True), (True, False), (True, False)] * 2


def test_plans_hold_no_tensor_and_their_number_is_bounded(monkeypatch):
    monkeypatch.setattr(ops, "_MAX_PLANS", 3)
    for heads in (2, 4, 6, 8, 10):
        given = arguments(CASE._replace(heads=heads, lengths_q=(5, 9), lengths_k=(13, 4), alibi="heads"))
        differentiate(given)
        assert 1 <= len(ops._backward_plans) <= 3
    rest = [x for x in given.pop("rest") if isinstance(x, Tensor)]
    assert len(rest) == 3
    watched = [weakref.ref(x) for x in (*given.values(), *rest) if x is not None]
    del given, rest
    gc.collect()
    assert [x() for x in watched if x() is not None] == []


@pytest.mark.parametrize("layout", ["contiguous", "packed", "expanded", "sliced"])
def test_new_gradients_are_dense(layout):
    x = arrange(torch.randn(2, 5, 1, 8), layout)
    for shape in (x, x[:1], x[:, :1], x[:0]):
        assert ops.allocate_gradients(shape)[0].stride() == torch.empty(shape.shape).stride()


def test_a_dispatched_call_and_a_direct_one_share_a_plan():
    call = make_inputs(CASE, torch.float32)
    forward = run_engine(call, with_gradients=False)
    direct = run_backward(call, **forward)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        heard = run_backward(call, **forward)
    assert "flash_attn_plus::backward" in {event.name for event in profile.events()}
    assert len(ops._backward_plans) == 1
    assert all(torch.equal(direct[n], heard[n]) for n in direct)
