"""Calls in words: what they come to, and the sentence for each that is not understood."""

import pytest
import torch

from flash_attn_plus import InvalidArgument
from flash_attn_plus.cli import words
from flash_attn_plus.cli.shapes import shapes_of
from flash_attn_plus.testing import Case, make_inputs


def problem(text, **kwargs):
    call = words.read_call(text)
    return shapes_of(call.case, call.dtype).problem(call.device, **kwargs)


def test_every_word_reaches_the_problem():
    p = problem("b=3 sq=70 sk=200 h=8 hk=2 d=64 dv=32 dtype=fp16 window=5,7 softcap=20 alibi device=cpu")
    assert (p.batch, p.seqlen_q, p.seqlen_k, p.heads, p.heads_k, p.head_dim, p.head_dim_v) == (3, 70, 200, 8, 2, 64, 32)
    assert (p.dtype, p.left, p.right, p.has_softcap, p.has_alibi) == (torch.float16, 5, 7, True, True)
    assert p.device == torch.device("cpu")
    p = problem("b=2 s=64 varlen dropout causal")
    assert (p.is_varlen_q, p.is_varlen_k, p.has_dropout, p.right) == (True, True, True, 0)
    p = problem("s=64 page=16 dtype=fp32")
    assert (p.page_size, p.has_seqused_k, p.dtype) == (16, True, torch.float32)
    assert problem("leftpad seqused").has_leftpad_k
    call = words.read_call("grad deterministic")
    assert call.has_gradients
    assert call.is_deterministic


def test_shapes_without_contents_describe_what_real_tensors_do():
    base = Case(batch=2, seqlen_q=9, seqlen_k=33, heads=4, heads_k=2, head_dim=16, head_dim_v=24, left=3, right=0)
    cases = [
        base,
        base._replace(lengths_q=(9, 0, 4), lengths_k=(33, 1, 2), right=-1),
        base._replace(page_size=16, used=(30, 2), alibi="batch"),
        base._replace(leftpad=(0, 3), used=(30, 9), softcap=2.0),
        base._replace(dropout_p=0.1, alibi="heads"),
    ]
    for case in cases:
        call, shapes = make_inputs(case, torch.float16), shapes_of(case, torch.float16)
        assert shapes.problem(torch.device("cpu")) == call.problem()
        for real, meta in zip(call.inputs, shapes.inputs, strict=True):
            if isinstance(real, torch.Tensor):
                assert meta.dtype == real.dtype
                assert meta.stride() == real.stride()
            else:
                assert meta == real


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("b=2 cusal", "'cusal' is not understood; did you mean causal"),
        ("xyzzy=3", "known words: b, h, hk"),
        ("b=0", "b needs a positive integer, such as b=8, not '0'"),
        ("b=two", "b needs a positive integer"),
        ("b", "b needs a positive integer"),
        ("s=00", "s needs a positive integer"),
        ("s=2147483648", "s=2147483648 is too large; give at most 2147483647"),
        ("h=" + "9" * 5000, "h=99999999999999999999 is too large"),
        ("b=1048577 varlen", "give at most 1048576 sequences"),
        ("b=1 b=2", "b is given twice"),
        ("causal=1", "causal takes no value"),
        ("window=3", "window needs two integers, such as window=128,0"),
        ("window=a,b", "window needs two integers"),
        ("softcap=hot", "softcap needs a number"),
        ("dtype=int8", "dtype=int8 is no dtype of attention; choose one of bf16"),
        ("device=toaster", "device=toaster names no device"),
        ("device", "device needs a value"),
        ("page=16 grad", "have no backward; leave out grad"),
    ],
)
def test_what_is_not_understood_gets_a_sentence(text, why):
    with pytest.raises(InvalidArgument, match=why):
        words.read_call(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [("h=8 hk=3", "must divide number of heads"), ("d=1024", "at most"), ("page=16 leftpad", "not supported together")],
)
def test_a_call_that_breaks_the_contract_gets_the_engine_s_own_sentence(text, why):
    with pytest.raises(InvalidArgument, match=why):
        problem(text)


def test_a_device_that_is_not_here_is_told(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(InvalidArgument, match="device=cuda is not here: PyTorch sees no accelerator; use device=cpu"):
        words.read_call("device=cuda")


def test_lengths_of_a_model_are_a_range():
    assert words.read("s=16", words.MODEL_WORDS) == {"s": (16, 16)}
    assert words.read("s=1..64 decode", words.MODEL_WORDS) == {"s": (1, 64), "decode": True}
    with pytest.raises(InvalidArgument, match=r"s=64\.\.1 ends before it begins; write s=1\.\.64"):
        words.read("s=64..1", words.MODEL_WORDS)
    with pytest.raises(InvalidArgument, match="b=1048577 is too large"):
        words.read("b=1..1048577", words.MODEL_WORDS)
    with pytest.raises(InvalidArgument, match="s needs a positive integer"):
        words.read("s=1..", words.MODEL_WORDS)
