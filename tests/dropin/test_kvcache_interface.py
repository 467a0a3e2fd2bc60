"""flash_attn_with_kvcache: attention over caches, appends in place, rotary, and views of caches."""

import pytest
import torch
from flash_attn import flash_attn_with_kvcache

from flash_attn_plus.testing import Case, assert_matches_reference, make_inputs

BASE = Case(batch=3, seqlen_q=4, seqlen_k=53, heads=4, heads_k=2, head_dim=32)
CASES = {
    "full": BASE,
    "used": BASE._replace(used=(53, 20, 5)),
    "causal": BASE._replace(used=(53, 20, 5), right=0),
    "window": BASE._replace(used=(53, 20, 5), left=7, right=2),
    "leftpad": BASE._replace(used=(53, 20, 9), leftpad=(4, 0, 3), right=0),
    "leftpad_full": BASE._replace(leftpad=(4, 0, 3)),
    "pages_of_16": BASE._replace(used=(53, 20, 5), page_size=16, right=0),
    "pages_of_256": BASE._replace(used=(53, 20, 5), page_size=256),
    "softcap": BASE._replace(used=(53, 20, 5), softcap=2.0),
    "alibi": BASE._replace(used=(53, 20, 5), alibi="batch", right=0),
    "one_query": BASE._replace(seqlen_q=1, used=(53, 20, 5), right=0),
    "head_dim_59": BASE._replace(head_dim=59, used=(53, 20, 5)),
    "strided": BASE._replace(layout="packed", used=(53, 20, 5)),
}


def options_of(call) -> dict:
    return {
        "softmax_scale": call.inputs.softmax_scale,
        "causal": call.right == 0,
        "window_size": (call.left, -1 if call.right == 0 else call.right),
        "softcap": call.inputs.softcap,
        "alibi_slopes": call.inputs.alibi_slopes,
    }


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["precise", "bf16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_attention_over_a_cache(case, dtype, device, precise):
    call = make_inputs(case, dtype or precise, device)
    x = call.inputs
    out, lse = flash_attn_with_kvcache(
        x.q, x.k, x.v, cache_seqlens=x.seqused_k, cache_leftpad=x.leftpad_k, block_table=x.block_table,
        return_softmax_lse=True, **options_of(call),
    )  # fmt: skip
    assert_matches_reference(call, {"out": out, "lse": lse})


def test_result_without_lse_is_a_tensor(device):
    call = make_inputs(BASE, torch.float32, device)
    assert isinstance(flash_attn_with_kvcache(*call.inputs[:3]), torch.Tensor)


@pytest.mark.parametrize("splits", [1, 5, 128])
def test_num_splits_changes_rounding_at_most(splits, device):
    call = make_inputs(CASES["causal"], torch.float32, device)
    args = {"cache_seqlens": call.inputs.seqused_k, "causal": True}
    found = flash_attn_with_kvcache(*call.inputs[:3], **args, num_splits=splits)
    assert_matches_reference(call, {"out": found})
    if device == "cpu":  # where keys are not split
        assert torch.equal(found, flash_attn_with_kvcache(*call.inputs[:3], **args))


class Append:
    """A cache with lengths, new keys and values, and a slow model of what appending them means."""

    lengths = (11, 0, 30)

    def __init__(self, dtype, device, *, page_size=0, rows=3, capacity=64, new=5, queries=5):
        random = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(shape, generator=random, dtype=torch.float64).to(device, dtype)

        self.table = None
        shape = (rows, capacity)
        if page_size:
            blocks = capacity // page_size
            order = torch.randperm(3 * blocks + 2, generator=random)[: 3 * blocks]
            self.table = order.view(3, blocks).int().to(device)
            shape = (3 * blocks + 2, page_size)
        self.k_cache, self.v_cache = normal(*shape, 2, 32), normal(*shape, 2, 32)
        self.k, self.v, self.q = normal(3, new, 2, 32), normal(3, new, 2, 32), normal(3, queries, 4, 32)
        self.cache_seqlens = torch.tensor(self.lengths, dtype=torch.int32, device=device)
        self.new = new

    def slot(self, n: int, position: int, batch_idx=None) -> tuple[int, int]:
        if self.table is not None:
            page = self.k_cache.shape[1]
            return int(self.table[n, position // page]), position % page
        return (n if batch_idx is None else int(batch_idx[n])), position

    def expected_caches(self, k_new, batch_idx=None):
        """Clones of the caches with k_new and v written token by token."""
        caches = self.k_cache.clone(), self.v_cache.clone()
        for n, length in enumerate(self.lengths):
            for t in range(self.new):
                row, column = self.slot(n, length + t, batch_idx)
                caches[0][row, column], caches[1][row, column] = k_new[n, t], self.v[n, t]
        return caches


@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_append_writes_exactly_the_new_rows(page_size, dtype, device):
    made = Append(dtype, device, page_size=page_size)
    k_cache, v_cache = made.expected_caches(made.k)
    lengths = made.cache_seqlens + 5
    expected = flash_attn_with_kvcache(
        made.q, k_cache, v_cache, cache_seqlens=lengths, block_table=made.table, causal=True
    )
    out = flash_attn_with_kvcache(
        made.q, made.k_cache, made.v_cache, made.k, made.v, cache_seqlens=made.cache_seqlens, block_table=made.table,
        causal=True,
    )  # fmt: skip
    assert torch.equal(made.k_cache, k_cache)
    assert torch.equal(made.v_cache, v_cache)
    assert torch.equal(out, expected)


def test_number_of_new_keys_differs_from_queries(device):
    made = Append(torch.float32, device, new=7, queries=2)
    k_cache, v_cache = made.expected_caches(made.k)
    out = flash_attn_with_kvcache(
        made.q, made.k_cache, made.v_cache, made.k, made.v, cache_seqlens=made.cache_seqlens, causal=True
    )
    assert torch.equal(made.k_cache, k_cache)
    expected = flash_attn_with_kvcache(made.q, k_cache, v_cache, cache_seqlens=made.cache_seqlens + 7, causal=True)
    assert torch.equal(out, expected)


def test_cache_seqlens_may_be_an_int(device):
    made, other = Append(torch.float32, device), Append(torch.float32, device)
    lengths = torch.full((3,), 9, dtype=torch.int32, device=device)
    out = flash_attn_with_kvcache(made.q, made.k_cache, made.v_cache, made.k, made.v, cache_seqlens=9)
    expected = flash_attn_with_kvcache(other.q, other.k_cache, other.v_cache, other.k, other.v, cache_seqlens=lengths)
    assert torch.equal(out, expected)
    assert torch.equal(made.k_cache, other.k_cache)


@pytest.mark.parametrize("has_leftpad", [False, True])
def test_cache_batch_idx(has_leftpad, device):
    made = Append(torch.float32, device, rows=6)
    batch_idx = torch.tensor([4, 0, 3], dtype=torch.int32, device=device)
    leftpad = torch.tensor([2, 0, 7], dtype=torch.int32, device=device) if has_leftpad else None
    k_cache, v_cache = made.expected_caches(made.k, batch_idx)
    out = flash_attn_with_kvcache(
        made.q, made.k_cache, made.v_cache, made.k, made.v, cache_seqlens=made.cache_seqlens,
        cache_batch_idx=batch_idx, cache_leftpad=leftpad, causal=True,
    )  # fmt: skip
    assert torch.equal(made.k_cache, k_cache)
    assert torch.equal(made.v_cache, v_cache)
    expected = flash_attn_with_kvcache(
        made.q, k_cache[batch_idx.long()], v_cache[batch_idx.long()], cache_seqlens=made.cache_seqlens + 5,
        cache_leftpad=leftpad, causal=True,
    )  # fmt: skip
    torch.testing.assert_close(out, expected)


def test_cache_batch_idx_over_whole_caches(device):
    made = Append(torch.float32, device, rows=6)
    batch_idx = torch.tensor([5, 5, 1], dtype=torch.int32, device=device)
    rows = batch_idx.long()
    out = flash_attn_with_kvcache(made.q, made.k_cache, made.v_cache, cache_batch_idx=batch_idx)
    torch.testing.assert_close(out, flash_attn_with_kvcache(made.q, made.k_cache[rows], made.v_cache[rows]))


def test_caches_with_more_rows_than_the_batch(device):
    made = Append(torch.float32, device, rows=6)
    out = flash_attn_with_kvcache(made.q, made.k_cache, made.v_cache)
    assert torch.equal(out, flash_attn_with_kvcache(made.q, made.k_cache[:3], made.v_cache[:3]))


@pytest.mark.parametrize("view", ["interleaved", "permuted"])
def test_strided_views_are_written_in_place(view, device):
    made = Append(torch.float32, device)
    k_cache, v_cache = made.expected_caches(made.k)
    if view == "interleaved":
        storage = torch.stack((made.k_cache, made.v_cache), 2)
        views = storage[:, :, 0], storage[:, :, 1]
    else:
        storage = torch.stack((made.k_cache, made.v_cache)).transpose(1, 2).contiguous()
        views = storage[0].permute(1, 0, 2, 3), storage[1].permute(1, 0, 2, 3)
    out = flash_attn_with_kvcache(made.q, *views, made.k, made.v, cache_seqlens=made.cache_seqlens, causal=True)
    assert torch.equal(views[0], k_cache)
    assert torch.equal(views[1], v_cache)
    expected = flash_attn_with_kvcache(made.q, k_cache, v_cache, cache_seqlens=made.cache_seqlens + 5, causal=True)
    torch.testing.assert_close(out, expected)


def rotated(x, positions, cos, sin, is_interleaved):
    """Token by token: complex numbers of the pairs, multiplied by cos + i sin of the token's position."""
    half = cos.shape[1]
    out = x.double().clone()
    for n in range(x.shape[0]):
        for t in range(x.shape[1]):
            turn = torch.complex(cos[positions[n][t]].double(), sin[positions[n][t]].double())
            first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if is_interleaved else (
                slice(0, half), slice(half, 2 * half)
            )  # fmt: skip
            turned = torch.complex(out[n, t, :, first].clone(), out[n, t, :, second].clone()) * turn
            out[n, t, :, first], out[n, t, :, second] = turned.real, turned.imag
    return out.to(x.dtype)


@pytest.mark.parametrize("is_interleaved", [True, False])
@pytest.mark.parametrize("rotary_dim", [16, 32])
@pytest.mark.parametrize(
    ("options", "turns_each_query"),
    [
        ({"causal": True}, True),
        ({"window_size": (6, 0)}, True),
        ({"window_size": (6, 3)}, True),
        ({}, False),
        ({"window_size": (64, 64)}, False),  # as wide as the cache: no window
    ],
    ids=["causal", "causal_window", "window", "full", "wide_window"],
)
@pytest.mark.parametrize("page_size", [0, 16])
def test_rotary(page_size, options, turns_each_query, rotary_dim, is_interleaved, device):
    made = Append(torch.float32, device, page_size=page_size)
    angles = torch.rand(70, rotary_dim // 2, generator=torch.Generator().manual_seed(1)).to(device) * 6.28
    cos, sin = angles.cos(), angles.sin()
    positions = [[length + t for t in range(5)] for length in made.lengths]
    k_new = rotated(made.k, positions, cos, sin, is_interleaved)
    at = positions if turns_each_query else [[length] * 5 for length in made.lengths]
    q = rotated(made.q, at, cos, sin, is_interleaved)
    k_cache, v_cache = made.expected_caches(k_new)
    out = flash_attn_with_kvcache(
        made.q, made.k_cache, made.v_cache, made.k, made.v, cos, sin, made.cache_seqlens, block_table=made.table,
        rotary_interleaved=is_interleaved, **options,
    )  # fmt: skip
    torch.testing.assert_close(made.k_cache, k_cache)
    assert torch.equal(made.v_cache, v_cache)
    lengths = made.cache_seqlens + 5
    expected = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths, block_table=made.table, **options)
    torch.testing.assert_close(out, expected)


def test_left_padding_does_not_shift_rotary(device):
    made, other = Append(torch.float32, device), Append(torch.float32, device)
    angles = torch.rand(64, 8, generator=torch.Generator().manual_seed(1)).to(device)
    args = (angles.cos(), angles.sin(), made.cache_seqlens)
    leftpad = torch.tensor([3, 0, 9], dtype=torch.int32, device=device)
    flash_attn_with_kvcache(made.q, made.k_cache, made.v_cache, made.k, made.v, *args, cache_leftpad=leftpad)
    flash_attn_with_kvcache(other.q, other.k_cache, other.v_cache, other.k, other.v, *args)
    assert torch.equal(made.k_cache, other.k_cache)


def test_inputs_that_require_gradients_build_no_graph(device):
    made = Append(torch.float32, device)
    q, k = made.q.requires_grad_(), made.k.requires_grad_()
    out = flash_attn_with_kvcache(q, made.k_cache, made.v_cache, k, made.v, cache_seqlens=made.cache_seqlens)
    assert not out.requires_grad
    assert not made.k_cache.requires_grad


def test_autocast_follows_the_dtype_of_the_cache(device):
    made, other = Append(torch.bfloat16, device), Append(torch.bfloat16, device)
    with torch.autocast(torch.device(device).type, torch.float16 if device == "cuda" else torch.bfloat16):
        out = flash_attn_with_kvcache(
            made.q.float(), made.k_cache, made.v_cache, made.k.float(), made.v.float(), cache_seqlens=made.cache_seqlens
        )
    expected = flash_attn_with_kvcache(
        other.q, other.k_cache, other.v_cache, other.k, other.v, cache_seqlens=other.cache_seqlens
    )
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    assert torch.equal(made.k_cache, other.k_cache)


def test_exact_capacity_is_not_refused(device):
    made = Append(torch.float32, device, page_size=16)
    full = torch.tensor([59, 0, 59], dtype=torch.int32, device=device)
    flash_attn_with_kvcache(
        made.q, made.k_cache, made.v_cache, made.k, made.v, cache_seqlens=full, block_table=made.table
    )


def test_torch_compile_takes_the_call_without_a_break():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 1, heads, 16) for heads in (4, 2, 2))
    caches = torch.randn(2, 2, 32, 2, 16)
    lengths = torch.tensor([5, 30], dtype=torch.int32)

    def step(q, k_cache, v_cache, k, v, lengths):
        return flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True) * 2.0

    eager_caches, compiled_caches = caches.clone(), caches.clone()
    eager = step(q, *eager_caches, k, v, lengths)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(q, *compiled_caches, k, v, lengths)
    assert torch.equal(compiled, eager)
    assert torch.equal(compiled_caches, eager_caches)
