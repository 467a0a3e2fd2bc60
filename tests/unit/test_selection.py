"""Which backend serves a call, what forces one, and what `explain` tells."""

import warnings

import pytest
import torch

from flash_attn_plus import AttentionProblem, NoBackend, attention, env, explain, selection, use_backend
from flash_attn_plus.backends import triton_portable


def problem(device="cpu", dtype=torch.bfloat16, **changes):
    sizes = {"batch": 1, "seqlen_q": 8, "seqlen_k": 8, "heads": 2, "heads_k": 2, "head_dim": 64, "head_dim_v": 64}
    return AttentionProblem(torch.device(device), dtype, **(sizes | changes))


@pytest.fixture(autouse=True)
def _no_wishes(monkeypatch):
    for name in (env.BACKEND, env.USE_FLAGGEMS):
        monkeypatch.delenv(name, raising=False)


def test_cpu_is_served_by_torch():
    assert selection.choose(problem()).name == "torch"


def test_explain_lists_every_backend_with_reasons_and_one_choice():
    told = explain(problem())
    assert {v.name for v in told} == set(selection.NAMES)
    assert [v.name for v in told if v.is_chosen] == ["torch"]
    assert all(v.reasons for v in told if not v.is_chosen)
    text = str(told)
    assert len(text.splitlines()) == len(selection.NAMES)
    assert "chosen" in text
    assert "flaggems  FlagGems" in text


def test_explain_takes_the_arguments_of_attention():
    q = torch.randn(1, 8, 2, 16)
    told = explain(q, q, q, causal=True, window_size=(4, -1), softcap=2.0, return_lse=True, backward=True)
    assert [v.name for v in told if v.is_chosen] == ["torch"]


def test_use_backend_forces_and_ends_with_its_block():
    with use_backend("torch"):
        assert selection.forced_backend() == "torch"
        with use_backend("triton"):
            assert selection.forced_backend() == "triton"
        assert selection.forced_backend() == "torch"
    assert selection.forced_backend() is None


def test_use_backend_ends_when_the_block_raises():
    with pytest.raises(KeyError), use_backend("torch"):
        raise KeyError
    assert selection.forced_backend() is None


def test_forced_backend_that_cannot_serve_raises_its_reason():
    q = torch.randn(1, 4, 1, 8, dtype=torch.float64)
    with use_backend("triton"), pytest.raises(NoBackend, match="triton: dtype float64 not supported"):
        attention(q, q, q)


@pytest.mark.parametrize("name", ["cuda", "flaggems"])
def test_engine_of_others_refuses_the_cpu_by_name(name):
    q = torch.randn(1, 4, 1, 8, dtype=torch.float16)
    with use_backend(name), pytest.raises(NoBackend, match=rf"{name}: device cpu"):
        attention(q, q, q)


@pytest.mark.parametrize(
    ("numpy", "triton", "is_refused"), [((2, 4), (3, 6), True), ((2, 3), (3, 6), False), ((2, 5), (3, 7), False)]
)
def test_the_interpreter_is_refused_beside_a_numpy_that_breaks_it(numpy, triton, is_refused, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton_portable, "_series", {"numpy": numpy, "triton": triton}.__getitem__)
    triton_portable.interpreter_lacks.cache_clear()
    try:
        reasons = selection.get("triton").reasons(problem())
    finally:
        triton_portable.interpreter_lacks.cache_clear()
    assert any("install 'numpy<2.4'" in reason for reason in reasons) == is_refused


def test_unknown_names_are_refused_with_the_known_ones(monkeypatch):
    with pytest.raises(NoBackend, match="'tritn' is unknown; choose one of gluon, triton"), use_backend("tritn"):
        pass
    with pytest.raises(NoBackend, match="'tritn' is unknown"):
        selection.get("tritn")
    monkeypatch.setenv(env.BACKEND, "tritn")
    with pytest.raises(NoBackend, match=f"{env.BACKEND}='tritn' is unknown"):
        selection.choose(problem())


def test_environment_is_read_at_call_time(monkeypatch):
    q = torch.randn(1, 4, 1, 8)
    attention(q, q, q)
    monkeypatch.setenv(env.BACKEND, "cuda")
    with pytest.raises(NoBackend, match="cuda"):
        attention(q, q, q)
    monkeypatch.setenv(env.BACKEND, "torch")
    attention(q, q, q)
    monkeypatch.setenv(env.BACKEND, "")
    attention(q, q, q)


def test_use_backend_goes_before_the_environment(monkeypatch):
    monkeypatch.setenv(env.BACKEND, "cuda")
    with use_backend("torch"):
        assert selection.choose(problem()).name == "torch"


@pytest.mark.parametrize(("raw", "value"), [("TRUE", True), ("1", True), ("off", False), ("False", False), ("", None)])
def test_flaggems_preference_reads_booleans(monkeypatch, raw, value):
    monkeypatch.setenv(env.USE_FLAGGEMS, raw)
    assert env.use_flaggems() is value


def test_flaggems_preference_that_is_no_boolean_raises(monkeypatch):
    monkeypatch.setenv(env.USE_FLAGGEMS, "maybe")
    with pytest.raises(ValueError, match=f"{env.USE_FLAGGEMS}='maybe' is neither TRUE nor FALSE"):
        selection.choose(problem())


@pytest.mark.parametrize("raw", ["TRUE", "FALSE"])
def test_flaggems_preference_leaves_the_cpu_to_torch(monkeypatch, raw):
    monkeypatch.setenv(env.USE_FLAGGEMS, raw)
    assert selection.choose(problem()).name == "torch"


def test_fp32_precision_is_one_of_three(monkeypatch):
    monkeypatch.delenv(env.FP32_PRECISION, raising=False)
    assert env.fp32_precision() == "ieee"
    monkeypatch.setenv(env.FP32_PRECISION, "TF32x3")
    assert env.fp32_precision() == "tf32x3"
    monkeypatch.setenv(env.FP32_PRECISION, "fp8")
    with pytest.raises(ValueError, match="ieee, tf32x3, tf32"):
        env.fp32_precision()


def test_capability_reasons_name_the_offending_value():
    reasons = selection.get("torch").reasons(problem(head_dim=1024, head_dim_v=640, dtype=torch.int8))
    assert reasons == ["dtype int8 not supported", "head_dim 1024 > 512", "head_dim_v 640 > 512"]


class Stub:
    """A backend of which only the answers matter."""

    def __init__(self, name, reasons=(), yields=None, input_reasons=(), leads=None, dormant=None):
        self.name, self._answers = name, (list(reasons), yields, list(input_reasons), leads, dormant)

    def reasons(self, problem):
        return self._answers[0]

    def yields(self, problem):
        return self._answers[1]

    def input_reasons(self, inputs):
        return self._answers[2]

    def leads(self, problem, over):
        return self._answers[3] if over == "triton" else None

    def dormant(self):
        return self._answers[4]

    def engine_name(self, problem):
        return "an engine" if self.name == "cuda" else ""


@pytest.fixture
def stubs(monkeypatch):
    """Stand-ins for the registered backends of a GPU call; returns the function that sets them."""

    def use(**backends):
        selection._choose.cache_clear()
        monkeypatch.setattr(selection, "get", lambda name: backends.get(name) or Stub(name, ["not here"]))

    yield use
    selection._choose.cache_clear()


def on_gpu():
    return problem()._replace(device=torch.device("cuda", 0))


def test_a_backend_may_yield_unless_asked_for_by_name(stubs):
    stubs(gluon=Stub("gluon", yields="too small"), triton=Stub("triton"))
    assert selection.choose(on_gpu()).name == "triton"
    assert ("gluon", ("too small",), False, "") in explain(on_gpu())
    with use_backend("gluon"):
        assert selection.choose(on_gpu()).name == "gluon"


def test_inputs_may_rule_a_backend_out(stubs):
    stubs(gluon=Stub("gluon", input_reasons=["misaligned"]), triton=Stub("triton"))
    assert selection.choose(on_gpu()).name == "gluon"
    assert selection.choose(on_gpu(), inputs=object()).name == "triton"
    with use_backend("gluon"), pytest.raises(NoBackend, match="gluon: misaligned"):
        selection.choose(on_gpu(), inputs=object())


def test_a_measurably_faster_backend_goes_first_and_says_by_how_much(stubs, monkeypatch):
    stubs(triton=Stub("triton"), cuda=Stub("cuda", leads="yields to cuda, 1.50 times as fast"))
    assert selection.choose(on_gpu()).name == "cuda"
    told = explain(on_gpu())
    assert told[1] == ("triton", ("yields to cuda, 1.50 times as fast",), False, "")
    assert told[2] == ("cuda", (), True, "an engine")
    assert "cuda      ok (an engine)  <- chosen" in str(told)
    with use_backend("triton"):
        assert selection.choose(on_gpu()).name == "triton"
    monkeypatch.setenv(env.USE_FLAGGEMS, "TRUE")
    with pytest.warns(UserWarning, match="but the triton backend runs the call"):
        assert selection.choose(on_gpu()).name == "triton"


def test_a_faster_backend_that_cannot_take_the_inputs_stays_behind(stubs):
    cuda = Stub("cuda", leads="yields to cuda", input_reasons=["misaligned"])
    stubs(triton=Stub("triton"), cuda=cuda)
    assert selection.choose(on_gpu(), inputs=object()).name == "triton"


def test_a_dormant_backend_is_told_of_without_being_asked(stubs, monkeypatch):
    sleeper = Stub("flaggems", dormant="asleep")
    monkeypatch.setattr(sleeper, "reasons", None)
    stubs(flaggems=sleeper, triton=Stub("triton"))
    assert ("flaggems", ("asleep",), False, "") in explain(on_gpu())


def test_what_a_wish_could_not_have_is_said_once_for_each_reason(stubs, monkeypatch):
    monkeypatch.setattr(selection, "_warned", set())
    monkeypatch.setenv(env.USE_FLAGGEMS, "FALSE")
    stubs(cuda=Stub("cuda", ["head_dim 300 > 256"]), triton=Stub("triton"))
    with pytest.warns(UserWarning, match=rf"{env.USE_FLAGGEMS}=FALSE, but the triton backend .*head_dim 300 > 256"):
        selection.choose(on_gpu())
    stubs(cuda=Stub("cuda", ["head_dim 301 > 256"]), triton=Stub("triton"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        selection.choose(on_gpu())
    stubs(cuda=Stub("cuda", ["dropout"]), triton=Stub("triton"))
    with pytest.warns(UserWarning, match="dropout"):
        selection.choose(on_gpu())
