"""The engines of others on a real GPU: all that they declare against the oracle, launches, graphs, streams, switching.

What is installed is tested; the committed support matrix says what that was when it was last recorded.
"""

import pytest
import torch
from cases import cache, crossed, dense, large_logits, varlen
from serving import CUDA_ENGINES, engine, refuses, run_directly

from flash_attn_plus import attention, env, explain, use_backend
from flash_attn_plus.ops import allocate_outputs
from flash_attn_plus.testing import Case, assert_matches_reference, make_inputs, run_engine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DTYPES = (torch.bfloat16, torch.float16)
CASES = dense("large") | varlen("large") | cache("large") | crossed("medium")
HOSTILE = large_logits("large")  # in float16 plain PyTorch, the yardstick, overflows
WIDE = Case(batch=2, seqlen_q=643, seqlen_k=643, heads=6, heads_k=2, head_dim=64)
PAGED = WIDE._replace(batch=3, seqlen_k=900, used=(900, 1, 333), page_size=256)
KINDS = {
    "full": WIDE,
    "causal_more_keys": WIDE._replace(seqlen_k=1037, right=0),
    "causal_more_queries": WIDE._replace(seqlen_k=300, right=0),
    "window": WIDE._replace(left=200, right=30),
    "window_left_more_queries": WIDE._replace(seqlen_k=300, left=100),
    "varlen_causal": WIDE._replace(lengths_q=(600, 1, 0, 300, 129), lengths_k=(700, 9, 5, 200, 0), right=0),
    "heads_of_their_own": WIDE._replace(heads_k=6, right=0),
    "varlen_heads_of_their_own": WIDE._replace(heads_k=6, lengths_q=(600, 1, 0, 300), lengths_k=(700, 9, 5, 200)),
    "paged_causal": PAGED._replace(right=0),
    "paged_decode": PAGED._replace(seqlen_q=1),
}


def _installed() -> list[str]:
    if not torch.cuda.is_available():
        return []
    return [name for name in ("flaggems", *(f"cuda {e}" for e in CUDA_ENGINES)) if engine(name).unavailable() is None]


INSTALLED = _installed()


def _served() -> list:
    found = []
    for name in INSTALLED:
        for dtype in DTYPES:
            for case_name, case in (CASES | HOSTILE if dtype == torch.bfloat16 else CASES).items():
                problem = case.problem(dtype, "cuda")
                if 0 not in (problem.seqlen_q, problem.seqlen_k) and not engine(name).reasons(problem):
                    dtype_name = str(dtype).removeprefix("torch.")
                    found.append(pytest.param(name, case, dtype, id=f"{name}-{case_name}-{dtype_name}"))
    return found


def check(name: str, case: Case, dtype: torch.dtype, with_dlse: bool = False) -> None:
    backend = engine(name)
    if refuses(backend, case, dtype, is_backward=False):
        pytest.skip("not served")
    with_backward = case.has_backward and not refuses(backend, case, dtype, is_backward=True, has_dlse=with_dlse)
    if with_dlse and not with_backward:
        pytest.skip("not served")
    run_directly(backend, case, dtype, "cuda", with_backward, with_dlse)


@pytest.mark.parametrize(("name", "case", "dtype"), _served())
def test_every_case_that_is_served(name, case, dtype):
    check(name, case, dtype)


@pytest.mark.parametrize("head_dim", [16, 32, 64, 72, 96, 128, 160, 192, 224, 256])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", INSTALLED)
def test_each_head_dim(name, kind, head_dim):
    check(name, KINDS[kind]._replace(head_dim=head_dim), torch.bfloat16)


@pytest.mark.parametrize("kind", ["full", "causal_more_queries", "varlen_causal"])
@pytest.mark.parametrize("name", INSTALLED)
def test_a_gradient_of_the_lse(name, kind):
    check(name, KINDS[kind], torch.bfloat16, with_dlse=True)


def _prepared(name: str, kind: str, seed: int = 0) -> tuple:
    """(a function that runs the forward pass again into the same outputs, the outputs, the call)."""
    backend, case = engine(name), KINDS[kind]
    if refuses(backend, case, torch.bfloat16, is_backward=False):
        pytest.skip("not served")
    call = make_inputs(case, torch.bfloat16, "cuda", seed=seed)
    problem = call.problem()
    out, lse = allocate_outputs(call.inputs.q, call.inputs.v, problem.is_varlen_q)
    return lambda: backend.forward(problem, call.inputs, out, lse), (out, lse), call


@pytest.mark.parametrize("kind", ["causal_more_keys", "varlen_causal", "paged_decode"])
@pytest.mark.parametrize("name", INSTALLED)
def test_launches_repeat_bitwise_and_in_a_graph(name, kind):
    run, results, call = _prepared(name, kind)
    run()
    expected = [x.clone() for x in results]
    for _ in range(20):
        for x in results:
            x.fill_(torch.nan)
        run()
        assert all(map(torch.equal, results, expected))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    call.inputs.q.mul_(2.0)
    run()
    doubled = [x.clone() for x in results]
    assert not torch.equal(doubled[0], expected[0])
    for x in results:
        x.fill_(torch.nan)
    graph.replay()
    assert all(map(torch.equal, results, doubled))
    assert_matches_reference(call, dict(zip(("out", "lse"), results, strict=True)))


@pytest.mark.parametrize("name", INSTALLED)
def test_two_streams_at_once(name):
    prepared = [_prepared(name, "causal_more_keys", seed) for seed in (0, 1)]
    expected = []
    for run, results, _ in prepared:
        run()
        expected.append([x.clone() for x in results])
    streams = [torch.cuda.Stream() for _ in prepared]
    torch.cuda.synchronize()
    for _ in range(20):
        for (run, results, _), stream in zip(prepared, streams, strict=True):
            with torch.cuda.stream(stream):
                for x in results:
                    x.fill_(torch.nan)
                run()
    torch.cuda.synchronize()
    for (_, results, _), known in zip(prepared, expected, strict=True):
        assert all(map(torch.equal, results, known))


@pytest.mark.parametrize("kind", ["full", "causal_more_queries", "window", "varlen_causal"])
def test_gradients_under_the_cuda_backend(kind):
    call = make_inputs(KINDS[kind], torch.bfloat16, "cuda")
    with use_backend("cuda"):
        assert_matches_reference(call, run_engine(call, with_gradients=True))


def _kernels(q: torch.Tensor) -> str:
    """The kernels of one call, as the profiler sees them."""
    attention(q, q, q, causal=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        attention(q, q, q, causal=True)
        torch.cuda.synchronize()
    return " ".join(event.key for event in trace.key_averages())


@pytest.mark.skipif("flaggems" not in INSTALLED, reason="needs FlagGems")
def test_the_variable_switches_the_kernels_of_the_next_call(monkeypatch):
    monkeypatch.delenv(env.BACKEND, raising=False)
    q = torch.randn(1, 700, 4, 64, dtype=torch.bfloat16, device="cuda")
    for value, backend in (("TRUE", "flaggems"), ("FALSE", "cuda"), ("TRUE", "flaggems")):
        monkeypatch.setenv(env.USE_FLAGGEMS, value)
        assert [v.name for v in explain(q, q, q, causal=True) if v.is_chosen] == [backend]
        kernels = _kernels(q)
        assert "attention_forward_kernel" not in kernels
        assert ("flash_varlen" in kernels) == (backend == "flaggems"), kernels
    monkeypatch.delenv(env.USE_FLAGGEMS)
    assert "attention_forward" in _kernels(q)
