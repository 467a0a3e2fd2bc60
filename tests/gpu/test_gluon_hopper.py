"""The Hopper backend against the oracle on a Hopper GPU, called directly, for every shared case that it serves."""

from itertools import accumulate
from random import Random
from typing import Literal

import pytest
import torch
from cases import cache, crossed, dense, varlen
from torch import Tensor

from flash_attn_plus.backends.gluon_hopper import GluonHopper
from flash_attn_plus.ops import allocate_outputs
from flash_attn_plus.problem import AttentionInputs, AttentionProblem, describe
from flash_attn_plus.testing import Case, arrange, assert_matches_reference, make_inputs
from flash_attn_plus.tuning import hopper

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
CASES = dense("large") | varlen("large") | cache("large") | crossed("large")
NAMES = [
    name
    for name, case in CASES.items()
    if not case.dropout_p and case.head_dim % 8 == 0 and case.seqlen_q and case.seqlen_k and not case.page_size % 128
]
WIDE = Case(batch=2, seqlen_q=1037, seqlen_k=1037, heads=4, heads_k=2, head_dim=128)


def results(
    x: AttentionInputs,
    problem: AttentionProblem,
    dout: Tensor,
    dlse: Tensor | None = None,
    layout: Literal["contiguous", "packed"] = "contiguous",
) -> dict[str, Tensor]:
    """Forward, and for a backward problem that is served the gradients, all into poisoned buffers."""
    backend = GluonHopper()
    out, lse = (t.fill_(torch.nan) for t in allocate_outputs(x.q, x.v, problem.is_varlen_q))
    backend.forward(problem._replace(is_backward=False), x, out, lse)
    found = {"out": out, "lse": lse}
    if problem.is_backward and backend.reasons(problem) == []:
        poison = (torch.full_like(t, torch.nan, memory_format=torch.contiguous_format) for t in (x.q, x.k, x.v))
        grads = [arrange(t, layout) for t in poison]
        delta = torch.full_like(lse, torch.nan)
        backend.backward(problem, x, dout, out, lse, dlse, *grads, delta)
        found |= dict(zip(("dq", "dk", "dv"), grads, strict=True)) | {"delta": delta}
    return found


def run(case: Case, dtype: torch.dtype, with_dlse: bool = False, is_deterministic: bool = False) -> None:
    """Forward, and backward where it is served, held to the tolerance rule."""
    backend, call = GluonHopper(), make_inputs(case, dtype, "cuda")
    problem = call.problem(is_backward=case.has_backward)._replace(is_deterministic=is_deterministic)
    assert backend.reasons(problem._replace(is_backward=False)) == []
    if backend.input_reasons(call.inputs):
        pytest.skip("inputs not served")
    layout = "packed" if case.layout == "packed" else "contiguous"
    found = results(call.inputs, problem, call.dout, call.dlse if with_dlse else None, layout)
    assert_matches_reference(call, found, with_dlse=with_dlse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_shared_cases(name, dtype):
    case = CASES[name]
    if GluonHopper().reasons(case.problem(dtype, "cuda")):
        pytest.skip("not served")
    run(case, dtype)


@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("kind", ["full", "causal", "causal_tall", "window", "packed_causal", "softcap", "alibi"])
def test_each_tile_width(kind, head_dim, is_deterministic):
    case = WIDE._replace(head_dim=head_dim)
    options = {
        "full": {},
        "causal": {"right": 0},
        "causal_tall": {"seqlen_k": 515, "right": 0},
        "window": {"left": 200, "right": 30},
        "packed_causal": {"lengths_q": (700, 1, 0, 300), "lengths_k": (600, 9, 5, 300), "trailing": 3, "right": 0},
        "softcap": {"softcap": 5.0, "right": 0},
        "alibi": {"alibi": "batch", "right": 0},
    }
    run(case._replace(**options[kind]), torch.bfloat16, with_dlse=True, is_deterministic=is_deterministic)


TALL = {
    "full": {},
    "fewer keys": {"seqlen_k": 515},
    "causal": {"right": 0},
    "causal, fewer keys": {"seqlen_k": 515, "right": 0},
    "causal, fewer queries": {"seqlen_q": 717, "right": 0},
    "window": {"left": 200, "right": 30},
    "softcap": {"softcap": 5.0, "right": 0},
    "packed": {"lengths_q": (2700, 1, 0, 2300), "lengths_k": (600, 9, 5, 300), "trailing": 3},
    "packed, causal": {"lengths_q": (700, 1, 0, 257, 64), "lengths_k": (900, 9, 5, 0, 70), "right": 0},
    "cache": {"batch": 4, "seqlen_q": 500, "seqlen_k": 1024, "right": 0, "used": (1024, 0, 300, 777)},
    "pages": {"batch": 4, "seqlen_q": 500, "seqlen_k": 1024, "right": 0, "used": (1024, 0, 300, 777), "page_size": 128},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", TALL)
def test_tall_tiles(kind, dtype, monkeypatch):
    """Warpgroups without rows, without visible keys and ahead of others; the same bits each time."""
    for name, value in (("MANY", 0), ("MOST", 2), ("MOST_CAUSAL", 2)):
        monkeypatch.setattr(hopper, name, value)
    case = WIDE._replace(head_dim=64, heads=40, heads_k=20)._replace(**TALL[kind])
    call = make_inputs(case, dtype, "cuda")
    problem, queries = call.problem(), call.inputs.q.shape[0] / case.sequences if "packed" in kind else None
    assert hopper.forward_tile(problem, queries).consumers == 4
    found = results(call.inputs, problem, call.dout)
    assert_matches_reference(call, found)
    for _ in range(50):
        for name, again in results(call.inputs, problem, call.dout).items():
            assert torch.equal(again.nan_to_num(), found[name].nan_to_num()), name


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("page_size", [0, 128, 256])
def test_chunks_of_a_prompt_against_a_cache(page_size, head_dim):
    """What lies beyond a sequence's keys is NaN, in the last page too."""
    case = WIDE._replace(batch=4, head_dim=head_dim, seqlen_q=300, seqlen_k=1024, right=0, page_size=page_size)
    run(case._replace(used=(1024, 0, 300, 777)), torch.bfloat16)


def test_hostile_scores():
    run(WIDE._replace(q_factor=30.0, right=0), torch.bfloat16)


@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_results_repeat_bitwise(head_dim, is_deterministic):
    """A race between roles shows as a result that changes from run to run."""
    lengths = {"lengths_q": (2500, 1, 0, 300), "lengths_k": (2500, 9, 5, 300), "right": 0}
    call = make_inputs(WIDE._replace(head_dim=head_dim, **lengths), torch.bfloat16, "cuda")
    problem = call.problem(is_backward=True)._replace(is_deterministic=is_deterministic)
    names = ("out", "lse", "dk", "dv", "dq")[: 5 if is_deterministic or head_dim == 256 else 4]
    first = None
    for _ in range(200):
        found = results(call.inputs, problem, call.dout)
        first = first or found
        for name in names:
            assert torch.equal(found[name], first[name]), name


LENGTHS = (0, 1, 63, 64, 65, 127, 128, 129, 200, 300)
PAIRS = [(q, k) for q in LENGTHS for k in LENGTHS]


def rows_of(lengths: list[int]) -> list[Tensor]:
    """The rows of each sequence among all."""
    ends = list(accumulate(lengths))
    return [torch.arange(end - n, end, device="cuda") for n, end in zip(lengths, ends, strict=True)]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("right", [-1, 0])
def test_random_packed_batches(right, head_dim):
    """Sequences without queries or keys, shorter than a tile and just beyond one, 1,000 batches in any order.

    A sequence's results are held to the tolerance once, and do not depend on the batch that it is in.
    """
    lengths_q, lengths_k = zip(*PAIRS, strict=True)
    case = WIDE._replace(batch=len(PAIRS), head_dim=head_dim, right=right, lengths_q=lengths_q, lengths_k=lengths_k)
    call = make_inputs(case, torch.bfloat16, "cuda")
    problem = call.problem(is_backward=True)._replace(is_deterministic=True)
    expected = results(call.inputs, problem, call.dout)
    assert_matches_reference(call, expected)
    pool_q, pool_k, random = rows_of(lengths_q), rows_of(lengths_k), Random(head_dim + right)
    for _ in range(167):
        picked = [*random.choices(range(len(PAIRS)), k=random.randint(1, 9)), PAIRS.index((65, 129))]
        at_q, at_k = torch.cat([pool_q[i] for i in picked]), torch.cat([pool_k[i] for i in picked])
        starts = [[0, *accumulate(lengths[i] for i in picked)] for lengths in (lengths_q, lengths_k)]
        cu_q, cu_k = torch.tensor(starts, dtype=torch.int32, device="cuda")
        x = call.inputs._replace(
            q=call.inputs.q[at_q], k=call.inputs.k[at_k], v=call.inputs.v[at_k], cu_seqlens_q=cu_q, cu_seqlens_k=cu_k
        )
        longest = [max(lengths[i] for i in picked) for lengths in (lengths_q, lengths_k)]
        problem = describe(x, *longest, -1, right, is_backward=True, is_deterministic=True)
        found = results(x, problem, call.dout[at_q])
        for name in ("out", "dq", "dk", "dv"):
            assert torch.equal(found[name], expected[name][at_k if name in ("dk", "dv") else at_q]), (name, picked)
        assert torch.equal(found["lse"], expected["lse"][:, at_q]), picked


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("band", [(-1, -1), (-1, 0), (-1, 37), (200, 30)])
def test_gradients_of_queries_sum_up_in_memory_that_holds_anything(band, head_dim, monkeypatch):
    """Sequences that are short, uneven, without queries or without keys; the longer ones add up 12 parts."""

    def poisoned(like, empty_like=torch.empty_like):
        return empty_like(like).fill_(torch.nan if like.is_floating_point() else 1 << 30)

    tile = hopper.BACKWARD[head_dim]._replace(longest_split=0)  # else so few keys have a kernel of dq's own
    monkeypatch.setitem(hopper.BACKWARD, head_dim, tile)
    monkeypatch.setattr(torch, "empty_like", poisoned)
    lengths_q, lengths_k = zip(*PAIRS, (1500, 1500), (900, 1400), (1400, 900), strict=True)
    case = WIDE._replace(batch=len(lengths_q), head_dim=head_dim, left=band[0], right=band[1])
    run(case._replace(lengths_q=lengths_q, lengths_k=lengths_k), torch.bfloat16)
    run(case._replace(batch=2, seqlen_q=1100, seqlen_k=900, heads=8), torch.bfloat16)


def test_gradients_of_queries_sum_up_again_in_graphs():
    """Beside launches that are not in the graph; sums are in no fixed order, so they are held to the tolerance."""
    call = make_inputs(WIDE._replace(seqlen_k=2100, right=0), torch.bfloat16, "cuda")
    problem, backend = call.problem(is_backward=True), GluonHopper()
    found = results(call.inputs, problem, call.dout)
    grads = [torch.empty_like(found[name]) for name in ("dq", "dk", "dv")]
    given = call.inputs, call.dout, found["out"], found["lse"], None, *grads, found["delta"]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.backward(problem, *given)
    for _ in range(3):
        for grad in grads:
            grad.fill_(torch.nan)
        graph.replay()
        results(call.inputs, problem, call.dout)
        assert_matches_reference(call, found | dict(zip(("dq", "dk", "dv"), grads, strict=True)))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("batch", "heads", "length"), [(1, 1, 1), (1, 1, 64), (1, 1, 128), (33, 4, 128), (70, 8, 200)])
def test_grids_of_one_tile_and_of_many(batch, heads, length, head_dim):
    """Warpgroups without rows, programs without a second tile, and as many tiles as processors."""
    for right in (-1, 0):
        run(
            Case(batch, length, length, heads, heads, head_dim, right=right),
            torch.bfloat16,
            is_deterministic=right == 0,
        )


def test_scheduler_counter_survives_many_launches_and_graphs():
    backend, call = GluonHopper(), make_inputs(WIDE._replace(right=0), torch.bfloat16, "cuda")
    problem, x = call.problem(), call.inputs
    expected = allocate_outputs(x.q, x.v, False)
    backend.forward(problem, x, *expected)
    out, lse = allocate_outputs(x.q, x.v, False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.forward(problem, x, out, lse)
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        backend.forward(problem, x, *expected)
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])


def test_gradients_that_the_copy_engine_cannot_reach_come_from_the_portable_kernels():
    backend, call = GluonHopper(), make_inputs(WIDE._replace(right=0), torch.bfloat16, "cuda")
    x, problem = call.inputs, call.problem(is_backward=True)
    out, lse = allocate_outputs(x.q, x.v, False)
    backend.forward(call.problem(), x, out, lse)
    grads = [arrange(torch.full_like(t, torch.nan), "sliced") for t in (x.q, x.k, x.v)]
    delta = torch.full_like(lse, torch.nan)
    backend.backward(problem, x, call.dout, out, lse, None, *grads, delta)
    assert_matches_reference(call, dict(zip(("dq", "dk", "dv"), grads, strict=True)) | {"delta": delta})


@pytest.mark.parametrize(
    ("case", "word"),
    [
        (WIDE._replace(layout="sliced"), "16 bytes"),
        (WIDE._replace(layout="expanded"), "16 bytes"),
        (WIDE._replace(softmax_scale=-0.3), "softmax_scale -0.3"),
    ],
)
def test_inputs_it_cannot_serve_are_named(case, word):
    assert word in " ".join(GluonHopper().input_reasons(make_inputs(case, torch.bfloat16, "cuda").inputs))
