"""Variables switch engines between two calls; what an engine cannot have goes to our kernels, or raises when named."""

import warnings

import pytest
import torch
from engines import CALLS

from flash_attn_plus import AttentionProblem, NoBackend, attention, env, explain, selection, use_backend
from flash_attn_plus.backends import cuda_original
from flash_attn_plus.problem import AttentionInputs

PLAIN = AttentionProblem(torch.device("cuda", 0), torch.bfloat16, 2, 4096, 4096, 16, 16, 128, 128, right=0)


def chosen(problem: AttentionProblem) -> str:
    (name,) = [v.name for v in explain(problem) if v.is_chosen]
    assert selection.choose(problem).name == name
    return name


def reasons(problem: AttentionProblem, name: str) -> str:
    return "; ".join(next(v.reasons for v in explain(problem) if v.name == name))


def test_the_variable_switches_between_two_calls(installed, monkeypatch):
    seen = []
    for value in (None, "TRUE", "FALSE", "TRUE", None):
        if value is None:
            monkeypatch.delenv(env.USE_FLAGGEMS, raising=False)
        else:
            monkeypatch.setenv(env.USE_FLAGGEMS, value)
        seen.append(chosen(PLAIN))
    assert seen[1:4] == ["flaggems", "cuda", "flaggems"]
    assert seen[0] == seen[4]
    assert seen[0] in ("gluon", "triton")


def test_the_variable_switches_who_runs_the_call(installed, monkeypatch):
    """The stand-ins compute on CPU tensors, which selection is told to be a GPU's."""
    q = torch.randn(1, 6, 2, 16, dtype=torch.float16)
    monkeypatch.setattr(selection, "_CPU_FIRST", ("flaggems", "torch"))
    monkeypatch.setattr(selection.get("flaggems"), "reasons", lambda problem: [])
    monkeypatch.setenv(env.BACKEND, "flaggems")
    by_flaggems = attention(q, q, q)
    assert [name for name, _ in CALLS] == ["flash_attn_varlen_func"]
    monkeypatch.setenv(env.BACKEND, "torch")
    torch.testing.assert_close(attention(q, q, q), by_flaggems, rtol=2e-3, atol=2e-3)
    assert len(CALLS) == 1


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"is_backward": True}, "gradients"),
        ({"has_dropout": True}, "dropout"),
        ({"dtype": torch.float32}, "dtype float32"),
        ({"head_dim": 320, "head_dim_v": 320}, "head_dim 320 > 256"),
        ({"head_dim_v": 64}, "head_dim_v 64"),
        ({"has_leftpad_k": True}, "leftpad_k"),
        ({"has_seqused_k": True, "is_varlen_k": True}, "seqused_k beside cu_seqlens_k"),
        ({"has_block_mask": True}, "block_mask"),
        ({"cache_dtype": torch.float8_e4m3fn}, "keys and values in float8_e4m3fn"),
        ({"is_batch_invariant": True}, "batch invariance"),
    ],
)
def test_flaggems_refuses_and_under_true_our_kernels_serve(installed, monkeypatch, change, word):
    problem = PLAIN._replace(**change)
    monkeypatch.setenv(env.USE_FLAGGEMS, "TRUE")
    with pytest.warns(UserWarning, match=f"but the .* backend runs the call .*{word}"):
        assert selection.choose(problem).name in ("gluon", "triton", "torch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert chosen(problem._replace(seqlen_q=4097)) in ("gluon", "triton", "torch")
    assert word in reasons(problem, "flaggems")
    with use_backend("flaggems"), pytest.raises(NoBackend, match=f"flaggems: .*{word}"):
        selection.choose(problem)


@pytest.mark.parametrize(
    "change",
    [
        {"has_dropout": True},
        {"dtype": torch.float32},
        {"has_block_mask": True},
        {"cache_dtype": torch.float8_e4m3fn},
        {"is_batch_invariant": True},
    ],
)
def test_under_false_a_call_nobody_has_goes_to_our_kernels_and_raises_by_name(installed, monkeypatch, change):
    problem = PLAIN._replace(**change)
    monkeypatch.setenv(env.USE_FLAGGEMS, "FALSE")
    with pytest.warns(UserWarning, match=f"{env.USE_FLAGGEMS}=FALSE, but the"):
        assert selection.choose(problem).name in ("gluon", "triton", "torch")
    with use_backend("cuda"), pytest.raises(NoBackend, match="cuda: "):
        selection.choose(problem)


@pytest.mark.filterwarnings("ignore:FLASH_ATTENTION_USE_FLAGGEMS")
def test_under_true_the_original_kernels_never_serve(installed, monkeypatch):
    monkeypatch.setenv(env.USE_FLAGGEMS, "TRUE")
    installed("flaggems")
    assert chosen(PLAIN) != "cuda"
    assert "not in the order" in reasons(PLAIN, "cuda")


@pytest.mark.filterwarnings("ignore:FLASH_ATTENTION_USE_FLAGGEMS")
def test_both_libraries_absent_leaves_our_kernels_with_both_reasons(installed, monkeypatch):
    installed("flaggems", "fa2", "fa3", "fa4", "cudnn", "torch_fa2")
    for value, name in (("TRUE", "flaggems"), ("FALSE", "cuda")):
        monkeypatch.setenv(env.USE_FLAGGEMS, value)
        assert chosen(PLAIN) in ("gluon", "triton")
        assert "not here" in reasons(PLAIN, name)
    with use_backend("cuda"), pytest.raises(NoBackend, match=r"fa3 not here.*cudnn not here.*torch_fa2 not here"):
        selection.choose(PLAIN)


@pytest.mark.parametrize(
    ("absent", "change", "engine"),
    [
        ((), {}, "fa3"),
        ((), {"is_backward": True, "heads_k": 4}, "fa4"),
        ((), {"is_backward": True}, "fa4"),
        ((), {"is_backward": True, "heads_k": 4, "head_dim": 96, "head_dim_v": 96}, "cudnn"),
        ((), {"is_backward": True, "heads_k": 4, "right": -1, "left": 9}, "fa2"),
        ((), {"is_backward": True, "heads_k": 4, "right": 3, "left": 9, "is_varlen_q": True}, "fa2"),
        ((), {"is_backward": True, "heads_k": 4, "right": 3, "left": 9}, "fa4"),
        ((), {"seqlen_q": 512, "seqlen_k": 512, "is_backward": True}, "cudnn"),
        ((), {"heads_k": 4, "left": 100}, "fa4"),
        (("fa3", "fa4"), {}, "cudnn"),
        (("fa3", "fa4"), {"left": 100}, "fa2"),
        (("fa3", "fa4", "fa2"), {"left": 100}, "torch_fa2"),
        (("fa3", "fa4", "fa2"), {"is_varlen_q": True, "is_varlen_k": True}, "torch_fa2"),
        ((), {"has_alibi": True}, "fa2"),
        ((), {"page_size": 256}, "fa2"),
        (("fa2",), {"has_seqused_k": True}, "torch_fa2"),
        ((), {"is_backward": True, "is_deterministic": True}, "fa2"),
        ((), {"head_dim_v": 64}, "cudnn"),
    ],
)
def test_the_fittest_engine_serves(installed, absent, change, engine):
    installed(*absent)
    found, _ = cuda_original.judge(PLAIN._replace(**change))
    assert found.name == engine


def test_left_windows_are_not_asked_of_fa3(installed):
    fa3 = cuda_original.engine("fa3")
    assert not fa3.reasons(PLAIN)
    assert not fa3.reasons(PLAIN._replace(right=30))
    for left, right in ((100, 0), (100, 30), (0, -1)):
        assert "left windows" in " ".join(fa3.reasons(PLAIN._replace(left=left, right=right)))


def test_a_measured_advantage_puts_cuda_first_and_shows_the_number(installed):
    installed("fa3", "fa4")
    problem = PLAIN._replace(head_dim=256, head_dim_v=256, is_backward=True)
    for name in ("gluon", "triton"):
        if not selection.get(name).reasons(problem):
            first = name
            break
    told = explain(problem)
    for change in ({"heads_k": 4}, {"seqlen_q": 4000}, {"seqlen_q": 512, "seqlen_k": 512}, {"head_dim": 64}):
        assert selection.get("cuda").leads(problem._replace(**change), "triton") is None
    if first == "triton":
        assert chosen(problem) == "cuda"
        assert "cudnn reached 320 TFLOP/s here where triton reached 231" in reasons(problem, "triton")
    else:
        assert chosen(problem) == "gluon"
    assert next(v for v in told if v.name == "flaggems").reasons


def test_pages_that_are_not_adjacent_are_refused_by_flaggems(installed):
    flaggems = selection.get("flaggems")
    pool = torch.zeros(8, 2, 16, 2, 64)
    k, v = pool.unbind(1)
    inputs = AttentionInputs(torch.zeros(2, 1, 2, 64), k, v, 1.0, block_table=torch.zeros(2, 4, dtype=torch.int32))
    assert any("pages of k lie" in reason for reason in flaggems.input_reasons(inputs))
    huge = torch.empty(1, device="meta").expand(2**17 + 1, 2**14, 1)
    assert "q spans 2^31 elements or more" in flaggems.input_reasons(
        inputs._replace(q=huge.as_strided(huge.shape, (2**14, 1, 1)))
    )
