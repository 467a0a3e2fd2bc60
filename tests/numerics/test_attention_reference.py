"""Every backend against the float64 oracle: out, lse, all gradients and delta, with poisoned outputs."""

import torch
from cases import cache, crossed, dense, large_logits, varlen
from serving import served

from flash_attn_plus import use_backend
from flash_attn_plus.testing import assert_matches_reference, make_inputs, run_engine, run_forward

LSE_GRADIENT = {
    "full", "causal_tall", "mqa", "window_both", "softcap", "alibi_causal", "dropout", "value_wider", "no_key",
    "varlen", "varlen_causal",
}  # fmt: skip


def check(backend, case, dtype, device, with_dlse=False):
    call = make_inputs(case, dtype, device)
    with use_backend(backend):
        results = run_engine(call, with_gradients=case.has_backward, with_dlse=with_dlse)
    assert_matches_reference(call, results, with_dlse=with_dlse)


@served(dense)
def test_dense(backend, case, dtype, device):
    check(backend, case, dtype, device)


@served(varlen)
def test_varlen(backend, case, dtype, device):
    check(backend, case, dtype, device)


@served(cache)
def test_cache(backend, case, dtype, device):
    check(backend, case, dtype, device)


@served(crossed)
def test_crossed_features(backend, case, dtype, device):
    check(backend, case, dtype, device)


@served(lambda size: {name: case for name, case in (dense(size) | varlen(size)).items() if name in LSE_GRADIENT})
def test_gradient_of_lse(backend, case, dtype, device):
    check(backend, case, dtype, device, with_dlse=True)


@served(large_logits)
def test_large_logits(backend, case, dtype, device):
    check(backend, case, dtype, device)


@served(lambda size: dense(size) | varlen(size) | cache(size), (torch.float64,))
def test_float64(backend, case, dtype, device):
    check(backend, case, dtype, device)


@served(lambda size: {"infinite_query": dense(size)["causal"]}, (torch.float32,))
def test_a_spoiled_row_spoils_no_other(backend, case, dtype, device):
    call = make_inputs(case, dtype, device)
    with use_backend(backend):
        sound = run_forward(call)["out"]
        call.inputs.q[0, 3] = float("nan")
        spoiled = run_forward(call)["out"]
    others = torch.ones(sound.shape[:2], dtype=torch.bool, device=device)
    others[0, 3] = False
    assert torch.equal(sound[others], spoiled[others])
    assert spoiled[0, 3].isnan().all()
