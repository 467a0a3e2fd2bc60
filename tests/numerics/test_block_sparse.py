"""Attention under a block mask against the oracle, and what a block mask means."""

import pytest
import torch
from serving import BACKENDS, served

from flash_attn_plus import (
    InvalidArgument,
    block_mask_of_lists,
    block_sparse_attention,
    explain,
    selection,
    use_backend,
)
from flash_attn_plus.testing import Case, assert_matches_reference, make_inputs, run_engine

LENGTHS = {"small": (37, 70), "medium": (113, 203), "large": (515, 1037)}


def cases(size: str) -> dict[str, Case]:
    short, long = LENGTHS[size]
    unit = 32 if size == "small" else 128  # the kernels' tiles
    heads = 2 if size == "small" else 6
    base = Case(batch=2, seqlen_q=short, seqlen_k=long, heads=heads, heads_k=heads // 2, head_dim=32)
    base = base._replace(blocks="heads", block_size=(unit, unit))
    ragged = base._replace(lengths_q=(short, 1, long, 0, 7), lengths_k=(long, 5, short, 3, 0), blocks="batch")
    return {
        "whole": base,
        "wider_than_tiles": base._replace(block_size=(2 * unit, 4 * unit), left=short // 2, right=0, seqlen_q=long),
        "cut": base._replace(block_size=(16, 48), right=0, blocks="batch"),
        "cut_sparse": base._replace(block_size=(7, 9), block_density=0.1, head_dim_v=40),
        "cut_window": base._replace(block_size=(unit, 24), left=short // 3, right=short // 4, seqlen_q=long),
        "one_query": base._replace(batch=1, seqlen_q=1, heads=12, heads_k=6, blocks="shared"),  # few: lucky roundings
        "no_key": base._replace(seqlen_k=0),
        "varlen_causal": ragged._replace(right=0, trailing=3),
        "varlen_cut": ragged._replace(block_size=(16, 24), slack=9),
        "dropout_alibi": base._replace(dropout_p=0.3, alibi="batch", blocks="batch", layout="packed"),
        "softcap": base._replace(softcap=3.0, softmax_scale=-0.3, right=0, block_size=(unit, 16)),
    }


@served(cases)
def test_block_mask(backend, case, dtype, device):
    call = make_inputs(case, dtype, device)
    with use_backend(backend):
        results = run_engine(call, with_gradients=True, with_dlse=True)
    assert_matches_reference(call, results, with_dlse=True)


@served(lambda size: {name: case for name, case in cases(size).items() if case.seqlen_k}, (torch.float64,))
def test_float64(backend, case, dtype, device):
    call = make_inputs(case, dtype, device)
    with use_backend(backend):
        results = run_engine(call, with_gradients=True)
    assert_matches_reference(call, results)


def _bands(size: str) -> dict[str, Case]:
    short, long = LENGTHS[size]
    base = Case(seqlen_q=long, seqlen_k=long, heads=2, heads_k=1, head_dim=64, right=0)
    return {"causal": base, "window": base._replace(left=20, right=5, seqlen_q=short)}


def _visible(case: Case, block_q: int, block_k: int) -> torch.Tensor:
    """Bool (query blocks, key blocks): whether the case's band shows anything of a block."""
    row, col = torch.arange(case.seqlen_q)[:, None], torch.arange(case.seqlen_k)
    distance = col - row - (case.seqlen_k - case.seqlen_q)
    inside = (distance <= case.right) & ((distance >= -case.left) if case.left >= 0 else True)
    blocks = -(-case.seqlen_q // block_q), -(-case.seqlen_k // block_k)
    shown = torch.zeros(blocks, dtype=torch.bool)
    rows, cols = inside.nonzero().unbind(1)
    shown[rows // block_q, cols // block_k] = True
    return shown


def _masked(call, block_size: tuple[int, int], mask: torch.Tensor):
    mask = mask.to(call.inputs.q.device)[None, None]
    return call._replace(inputs=call.inputs._replace(block_mask=mask, block_size=block_size))


@pytest.mark.parametrize("block_size", [(32, 64), (128, 128)], ids=str)
@served(_bands, (torch.float32, torch.bfloat16))
def test_band_beside_the_blocks_that_it_meets(backend, case, dtype, device, block_size):
    """The mask of the blocks in which a band shows anything changes nothing."""
    call = make_inputs(case, dtype, device)
    with use_backend(backend):
        results = run_engine(_masked(call, block_size, _visible(case, *block_size)), with_gradients=True)
        plain = run_engine(call, with_gradients=True)
    assert_matches_reference(call, results)
    # The same tiles in the same order; plain calls in 16 bits may have others.
    if backend == "triton" and block_size == (128, 128) and dtype == torch.float32:
        assert all(torch.equal(results[name], plain[name]) for name in plain)


def _short_bands(size: str) -> dict[str, Case]:
    """None under the interpreter, in which lists of so many blocks take seconds."""
    return (
        {}
        if size == "small"
        else {name: case._replace(seqlen_q=20, seqlen_k=29) for name, case in _bands(size).items()}
    )


@served(_short_bands)
def test_band_given_as_blocks(backend, case, dtype, device):
    """A mask of blocks of one score can say what a band says."""
    call = make_inputs(case, dtype, device)
    with use_backend(backend):
        masked = _masked(call._replace(left=-1, right=-1), (1, 1), _visible(case, 1, 1))
        results = run_engine(masked, with_gradients=True)
    assert_matches_reference(call, results)


@served(lambda size: {"whole": cases(size)["whole"]._replace(blocks="batch", block_density=1.0)}, (torch.float32,))
def test_hidden_blocks_are_not_read(backend, case, dtype, device):
    """Keys and queries whose blocks are all hidden may hold anything; their gradients are 0."""
    call = make_inputs(case, dtype, device)
    size = case.block_size[0]
    mask = call.inputs.block_mask.clone()
    mask[..., 1] = False
    mask[..., -1, :] = False
    hidden, rows = slice(size, 2 * size), slice((mask.shape[2] - 1) * size, None)
    tensors = [x.clone() for x in (*call.inputs[:3], call.dout)]
    for x in tensors[1:3]:
        x[:, hidden] = float("nan")
    spoiled = call._replace(inputs=call.inputs._replace(k=tensors[1], v=tensors[2], block_mask=mask))
    with use_backend(backend):
        results = run_engine(spoiled, with_gradients=True)
    assert all(results[name].isfinite().all() for name in ("out", "dq", "dk", "dv", "delta"))
    assert (results["out"][:, rows] == 0).all()
    assert (results["lse"][..., rows] == float("inf")).all()
    assert (results["dq"][:, rows] == 0).all()
    assert (results["dk"][:, hidden] == 0).all()
    assert (results["dv"][:, hidden] == 0).all()


@served(lambda size: {"whole": cases(size)["whole"]._replace(right=0)}, (torch.float32,))
def test_public_call_repeats_and_differentiates(backend, case, dtype, device):
    """out, lse and gradients of the public call are the operators' bit for bit, at every call."""
    call = make_inputs(case, dtype, device)
    mask, block_size = call.inputs.block_mask, call.inputs.block_size
    q, k, v = (x.clone().requires_grad_() for x in call.inputs[:3])
    with use_backend(backend):
        out, lse = block_sparse_attention(q, k, v, mask, block_size=block_size, causal=True, return_lse=True)
        torch.autograd.backward((out, lse), (call.dout, call.dlse))
        direct = run_engine(call, with_gradients=True, with_dlse=True)
        with torch.no_grad():
            again = block_sparse_attention(q, k, v, mask[0], block_size=block_size, causal=True)
    for got, name in ((out, "out"), (lse, "lse"), (q.grad, "dq"), (k.grad, "dk"), (v.grad, "dv")):
        assert torch.equal(got, direct[name])
    assert torch.equal(again, out)


@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 2.0}, {"dropout_p": 0.4}], ids=str)
def test_gradcheck(options, device):
    """Against finite differences, in float64, which the torch backend alone serves."""
    random = torch.Generator().manual_seed(1)
    shapes = (1, 5, 2, 4), (1, 6, 1, 4), (1, 6, 1, 3)
    q, k, v = (torch.randn(s, generator=random, dtype=torch.float64).to(device).requires_grad_() for s in shapes)
    mask = torch.tensor([[[1, 0, 1], [0, 1, 1], [1, 0, 0]], [[0, 0, 0], [1, 1, 1], [0, 1, 0]]], device=device).bool()

    def call(q, k, v):
        torch.manual_seed(3)  # the same dropout bits at every evaluation
        out, lse = block_sparse_attention(q, k, v, mask, block_size=(2, 2), return_lse=True, **options)
        return out, lse.masked_fill(lse.isinf(), 0.0)

    with use_backend("torch"):
        assert torch.autograd.gradcheck(call, (q, k, v))


def test_mask_of_lists(device):
    counts = torch.tensor([[2, 0], [1, 3]], device=device)
    indices = torch.tensor([[[3, 1, 0], [7, 7, 7]], [[0, 9, -5], [2, 0, 1]]], device=device)
    expected = torch.tensor([[[0, 1, 0, 1], [0, 0, 0, 0]], [[1, 0, 0, 0], [1, 1, 1, 0]]], device=device).bool()
    assert torch.equal(block_mask_of_lists(counts, indices, 4), expected)
    with pytest.raises(InvalidArgument, match="counts must have shape"):
        block_mask_of_lists(counts[0], indices, 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_call(backend, device):
    """Without a graph break, with gradients."""
    call = make_inputs(
        Case(seqlen_q=20, seqlen_k=20, heads=2, heads_k=1, blocks="heads", block_size=(8, 8)), device=device
    )
    q, k, v = (x.clone().requires_grad_() for x in call.inputs[:3])

    def loss(q, k, v):
        return block_sparse_attention(q, k, v, call.inputs.block_mask, block_size=(8, 8), causal=True).square().sum()

    with use_backend(backend):
        expected = torch.autograd.grad(loss(q, k, v), (q, k, v))
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        actual = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    for got, wanted in zip(actual, expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_mask": torch.ones(2, 3)}, "dtype bool"),
        ({"block_mask": torch.ones(2, 2, dtype=torch.bool)}, r"\(1 or 2, 1 or 4, 2, 3\).*10 queries and 20 keys"),
        ({"block_mask": torch.ones(3, 2, 3, dtype=torch.bool)}, "1 or 4"),
        ({"block_mask": torch.ones(3, dtype=torch.bool)}, "2 to 4 dimensions"),
        ({"block_size": (8, 0)}, "two positive numbers"),
        ({"block_size": (8,)}, "block_size 2 numbers"),
        ({"block_mask": torch.ones(2, 3, dtype=torch.bool, device="meta")}, "block_mask must be on"),
    ],
)
def test_bad_masks_are_told(change, message, device):
    q, k = torch.zeros(2, 10, 4, 8, device=device), torch.zeros(2, 20, 2, 8, device=device)
    options = {"block_mask": torch.ones(2, 3, dtype=torch.bool, device=device), "block_size": (8, 8)} | change
    if options["block_mask"].device.type == "cpu":
        options["block_mask"] = options["block_mask"].to(device)
    with pytest.raises(InvalidArgument, match=message):
        block_sparse_attention(q, k, k, **options)


def test_backends_say_whether_they_take_block_masks(device):
    q, mask = torch.zeros(1, 64, 2, 32, device=device), torch.ones(1, 1, 2, 2, dtype=torch.bool, device=device)
    reasons = {v.name: v.reasons for v in explain(q, q, q, block_mask=mask, block_size=(32, 32))}
    assert not reasons["torch"]
    problem = Case(seqlen_q=64, seqlen_k=64, block_size=(32, 32), blocks="shared").problem(torch.bfloat16, "cuda")
    assert selection.get("gluon").capability.reasons(problem) == ["block_mask not implemented"]
    assert selection.get("triton").capability.reasons(problem) == []
