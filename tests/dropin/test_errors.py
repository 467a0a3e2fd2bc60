"""Every refusal of the contract: exception type, the fragment callers look for, and the same words for fake tensors."""

import flash_attn
import pytest
import torch
from flash_attn import flash_attn_interface as interface
from torch._subclasses.fake_tensor import FakeTensorMode

GPU = interface.flash_attn_gpu
I32, F32, BF16 = torch.int32, torch.float32, torch.bfloat16


def z(*shape, dtype=F32, device="cpu"):
    """Made when a call is made, so that the same call can be made under FakeTensorMode."""
    return torch.zeros(shape, dtype=dtype, device=device)


def turned(*shape):
    """A last stride other than 1."""
    return z(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)


def qkv(head_dim=16, heads_k=2, **options):
    return (
        z(2, 8, 4, head_dim, **options),
        z(2, 12, heads_k, head_dim, **options),
        z(2, 12, heads_k, head_dim, **options),
    )


def func(q=None, k=None, v=None, **options):
    defaults = qkv()
    return flash_attn.flash_attn_func(
        *(d if x is None else x for x, d in zip((q, k, v), defaults, strict=True)), **options
    )


def varlen(q=None, k=None, v=None, cu_q=None, cu_k=None, **options):
    return flash_attn.flash_attn_varlen_func(
        z(16, 4, 16) if q is None else q,
        z(24, 2, 16) if k is None else k,
        z(24, 2, 16) if v is None else v,
        z(3, dtype=I32) if cu_q is None else cu_q,
        z(3, dtype=I32) if cu_k is None else cu_k,
        8,
        12,
        **options,
    )


def private(q=None, k=None, v=None, dropout_p=0.0, alibi_slopes=None, return_softmax=False, softcap=0.0):
    q, k, v = (d if x is None else x for x, d in zip((q, k, v), qkv(), strict=True))
    return interface._flash_attn_forward(q, k, v, dropout_p, 0.25, False, -1, -1, softcap, alibi_slopes, return_softmax)


def private_varlen(**options):
    packed = z(16, 4, 16), z(24, 2, 16), z(24, 2, 16)
    paged = z(16, 4, 16), z(4, 256, 2, 16), z(4, 256, 2, 16)
    return interface._flash_attn_varlen_forward(
        *(paged if "block_table" in options else packed), z(3, dtype=I32), z(3, dtype=I32), 8, 12, 0.0, 0.25, False,
        **options,
    )  # fmt: skip


def private_backward(head_dim=16, grads=None, dout=None, out=None, lse=None, dropout_p=0.0, rng_state=None):
    q, k, v = qkv(head_dim)
    dout, out = (torch.zeros_like(q) if x is None else x for x in (dout, out))
    lse = z(2, 4, 8) if lse is None else lse
    grads = (torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)) if grads is None else grads
    return interface._flash_attn_backward(
        dout, q, k, v, out, lse, *grads, dropout_p, 0.25, False, -1, -1, 0.0, None, False, rng_state
    )


def raw(q=None, k=None, v=None, out=None, generator=None):
    q, k, v = (d if x is None else x for x, d in zip((q, k, v), qkv(), strict=True))
    return GPU.fwd(q, k, v, out, None, 0.0, 0.25, False, -1, -1, 0.0, False, generator)


def raw_backward(dout=None, dq=None, generator=None):
    q, k, v = qkv()
    dout = z(2, 8, 4, 16) if dout is None else dout
    return GPU.bwd(
        dout, q, k, v, z(2, 8, 4, 16), z(2, 4, 8), dq, None, None, None, 0.0, 0.25, False, -1, -1, 0.0, False,
        generator, None,
    )  # fmt: skip


def kvcache(q=None, k_cache=None, v_cache=None, **options):
    return flash_attn.flash_attn_with_kvcache(
        z(2, 8, 4, 32) if q is None else q,
        z(2, 12, 2, 32) if k_cache is None else k_cache,
        z(2, 12, 2, 32) if v_cache is None else v_cache,
        **options,
    )


def new(length=3, dtype=F32):
    return {"k": z(2, length, 2, 32, dtype=dtype), "v": z(2, length, 2, 32, dtype=dtype)}


def lengths():
    return {"cache_seqlens": z(2, dtype=I32)}


def rotary(rows=12, dim=32, dtype=F32):
    return {"rotary_cos": z(rows, dim // 2, dtype=dtype), "rotary_sin": z(rows, dim // 2, dtype=dtype)}


def table(dtype=I32):
    return {"k_cache": z(4, 256, 2, 32), "v_cache": z(4, 256, 2, 32), "block_table": z(2, 2, dtype=dtype)}


ERRORS = {
    "integer q": (lambda: func(*qkv(dtype=I32)), "only support fp16 and bf16"),
    "k dtype": (lambda: func(k=z(2, 12, 2, 16, dtype=BF16)), "must have the same dtype"),
    "v dtype": (lambda: func(v=z(2, 12, 2, 16, dtype=BF16)), "must have the same dtype"),
    "k rank": (lambda: func(k=z(12, 2, 16)), "k must have shape ("),
    "k batch": (lambda: func(k=z(3, 12, 2, 16)), "k must have shape ("),
    "k head dim": (lambda: func(k=z(2, 12, 2, 24)), "k must have shape ("),
    "v length": (lambda: func(v=z(2, 13, 2, 16)), "v must have shape ("),
    "empty batch": (lambda: func(z(0, 8, 4, 16), z(0, 12, 2, 16), z(0, 12, 2, 16)), "batch size must be positive"),
    "empty batch varlen": (lambda: varlen(cu_q=z(1, dtype=I32), cu_k=z(1, dtype=I32)), "batch size must be positive"),
    "head dim": (lambda: func(*qkv(520)), "forward only supports head dimension at most 256"),
    "head dim private": (lambda: private(*qkv(520)), "forward only supports head dimension at most 256"),
    "head dim backward": (lambda: private_backward(520), "backward only supports head dimension at most 256"),
    "multiple of 8": (lambda: private(*qkv(20)), "multiple of 8"),
    "multiple of 8 backward": (lambda: private_backward(20), "head_size should be a multiple of 8"),
    "head counts": (
        lambda: func(*qkv(heads_k=3)),
        "Number of heads in key/value must divide number of heads in query",
    ),
    "softcap with dropout": (lambda: func(softcap=1.0, dropout_p=0.1), "Softcapping does not support dropout"),
    "return_softmax": (
        lambda: private(return_softmax=True),
        "return_softmax is only supported when p_dropout > 0.0",
    ),
    "dropout of 1": (lambda: func(dropout_p=1.0), "p_dropout"),
    "negative dropout": (lambda: func(dropout_p=-0.1), "p_dropout"),
    "cu_seqlens_q dtype": (lambda: varlen(cu_q=z(3, dtype=torch.int64)), "cu_seqlens_q must have dtype int32"),
    "cu_seqlens_k dtype": (lambda: varlen(cu_k=z(3, dtype=torch.int64)), "cu_seqlens_k must have dtype int32"),
    "cu_seqlens stride": (lambda: varlen(cu_q=z(6, dtype=I32)[::2]), "cu_seqlens_q must be contiguous"),
    "cu_seqlens_k shape": (lambda: varlen(cu_k=z(4, dtype=I32)), "cu_seqlens_k must have shape ("),
    "seqused dtype": (lambda: private_varlen(seqused_k=z(2)), "must have dtype int32"),
    "leftpad dtype": (lambda: private_varlen(leftpad_k=z(2)), "must have dtype int32"),
    "table dtype": (
        lambda: private_varlen(block_table=z(2, 2, dtype=torch.int64)),
        "must have dtype torch.int32",
    ),
    "paged leftpad": (
        lambda: private_varlen(block_table=z(2, 2, dtype=I32), leftpad_k=z(2, dtype=I32)),
        "Paged KV and leftpad_k",
    ),
    "paged splits": (
        lambda: private_varlen(block_table=z(2, 2, dtype=I32), num_splits=2),
        "num_splits > 1 is not supported",
    ),
    "splits": (lambda: private_varlen(num_splits=129), "num_splits > 128 not supported"),
    "slopes dtype": (lambda: func(alibi_slopes=z(4, dtype=BF16)), "ALiBi slopes must have dtype fp32"),
    "slopes stride": (lambda: func(alibi_slopes=z(8)[::2]), "ALiBi slopes tensor must have contiguous last dimension"),
    "slopes shape": (lambda: func(alibi_slopes=z(3)), "alibi_slopes must have shape ("),
    "window": (lambda: func(window_size=(1, 2, 3)), "window_size"),
    "qkv shape": (lambda: flash_attn.flash_attn_qkvpacked_func(z(2, 8, 4, 4, 16)), "qkv must have shape ("),
    "kv shape": (
        lambda: flash_attn.flash_attn_kvpacked_func(z(2, 8, 4, 16), z(2, 8, 3, 4, 16)),
        "kv must have shape (",
    ),
    "varlen qkv shape": (
        lambda: flash_attn.flash_attn_varlen_qkvpacked_func(z(2, 8, 3, 4, 16), z(3, dtype=I32), 8),
        "qkv must have shape (",
    ),
    "missing max_seqlen": (
        lambda: flash_attn.flash_attn_varlen_qkvpacked_func(z(8, 3, 4, 16), z(3, dtype=I32), None),
        "max_seqlen_q is required",
    ),
    "raw q stride": (lambda: raw(q=turned(2, 8, 4, 16)), "q must have contiguous last dimension"),
    "raw k stride": (lambda: raw(k=turned(2, 12, 2, 16)), "k must have contiguous last dimension"),
    "raw out dtype": (lambda: raw(out=z(2, 8, 4, 16, dtype=BF16)), "query and out must have the same dtype"),
    "raw out shape": (lambda: raw(out=z(2, 9, 4, 16)), "out must have shape ("),
    "raw out stride": (lambda: raw(out=turned(2, 8, 4, 16)), "out must have contiguous last dimension"),
    "raw dout stride": (lambda: raw_backward(dout=turned(2, 8, 4, 16)), "dout must have contiguous last dimension"),
    "raw dq stride": (lambda: raw_backward(dq=turned(2, 8, 4, 16)), "dq must have contiguous last dimension"),
    "generator": (
        lambda: raw(generator=torch.Generator()),
        "generator` argument is no longer supported",
    ),
    "generator first": (
        lambda: raw(q=turned(2, 8, 4, 16), generator=torch.Generator()),
        "generator` argument is no longer supported",
    ),
    "generator backward": (
        lambda: raw_backward(generator=torch.Generator()),
        "generator` argument is no longer supported",
    ),
    "dout dtype": (lambda: private_backward(dout=z(2, 8, 4, 16, dtype=BF16)), "must have the same dtype"),
    "out dtype": (lambda: private_backward(out=z(2, 8, 4, 16, dtype=BF16)), "must have the same dtype"),
    "out shape": (lambda: private_backward(out=z(2, 9, 4, 16)), "out must have shape ("),
    "lse shape": (lambda: private_backward(lse=z(2, 4, 9)), "softmax_lse must have shape ("),
    "dk shape": (
        lambda: private_backward(grads=(z(2, 8, 4, 16), z(2, 12, 4, 16), z(2, 12, 2, 16))),
        "dk must have shape (",
    ),
    "dropout without state": (lambda: private_backward(dropout_p=0.1), "rng_state"),
    "cache dtype": (lambda: kvcache(k_cache=z(2, 12, 2, 32, dtype=BF16)), "must have the same dtype"),
    "cache rank": (lambda: kvcache(k_cache=z(12, 2, 32)), "k_cache must have shape (batch, seqlen_k,"),
    "cache head dim": (lambda: kvcache(k_cache=z(2, 12, 2, 16)), "k_cache must have q's head_dim"),
    "cache of other values": (lambda: kvcache(v_cache=z(2, 13, 2, 32)), "v_cache must have shape ("),
    "cache rows": (
        lambda: kvcache(k_cache=z(1, 12, 2, 32), v_cache=z(1, 12, 2, 32)),
        "k_cache must have a row for each of the 2 sequences",
    ),
    "new k rank": (lambda: kvcache(k=z(2), v=z(2), **lengths()), "k must have shape (batch, new,"),
    "k without v": (lambda: kvcache(k=z(2, 3, 2, 32), **lengths()), "value must also be passed in"),
    "v without k": (lambda: kvcache(v=z(2, 3, 2, 32), **lengths()), "key must also be passed in"),
    "append without lengths": (lambda: kvcache(**new()), "seqlens_k must also be passed in"),
    "append and long q": (
        lambda: kvcache(z(2, 13, 4, 32), **new(), **lengths()),
        "must have seqlen <= the seqlen of the KV cache",
    ),
    "new k dtype": (lambda: kvcache(**new(dtype=BF16), **lengths()), "must have the same dtype"),
    "new k shape": (
        lambda: kvcache(k=z(2, 3, 4, 32), v=z(2, 3, 4, 32), **lengths()),
        "k must have shape (",
    ),
    "rotary without k": (
        lambda: kvcache(**rotary(), **lengths()),
        "If rotary cos/sin are provided, new key / value",
    ),
    "cos without sin": (
        lambda: kvcache(rotary_cos=z(12, 16), **new(), **lengths()),
        "rotary sin must also be provided",
    ),
    "rotary dim": (lambda: kvcache(**new(), **lengths(), **rotary(dim=48)), "rotary_dim must be <= headdim"),
    "rotary multiple": (lambda: kvcache(**new(), **lengths(), **rotary(dim=24)), "divisible by 16"),
    "rotary rows": (
        lambda: kvcache(**new(), **lengths(), **rotary(rows=11)),
        "cos/sin seqlen must be at least the seqlen of KV cache",
    ),
    "rotary dtype": (
        lambda: kvcache(**new(), **lengths(), **rotary(dtype=BF16)),
        "rotary_cos must have the same dtype as query",
    ),
    "cache_seqlens dtype": (lambda: kvcache(cache_seqlens=z(2)), "must have dtype int32"),
    "cache_batch_idx dtype": (lambda: kvcache(cache_batch_idx=z(2)), "must have dtype int32"),
    "cache_leftpad dtype": (lambda: kvcache(cache_leftpad=z(2)), "must have dtype int32"),
    "block_table dtype": (lambda: kvcache(**table(torch.int64), **lengths()), "must have dtype torch.int32"),
    "paged cache_batch_idx": (
        lambda: kvcache(**table(), **lengths(), cache_batch_idx=z(2, dtype=I32)),
        "Paged KVcache does not support cache_batch_idx",
    ),
    "paged cache_leftpad": (
        lambda: kvcache(**table(), **lengths(), cache_leftpad=z(2, dtype=I32)),
        "Paged KV and leftpad_k",
    ),
    "cache splits": (lambda: kvcache(num_splits=129), "num_splits > 128 not supported"),
}


def refused(call) -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        call()
    return caught.value


@pytest.mark.parametrize(("call", "fragment"), ERRORS.values(), ids=ERRORS)
def test_refusal(call, fragment):
    error = refused(call)
    assert fragment in str(error)
    with FakeTensorMode():
        assert str(refused(call)) == str(error)


@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_cache_stride_is_an_assertion(name):
    with pytest.raises(AssertionError, match=f"{name} must have contiguous last dimension"):
        kvcache(**{name: turned(2, 12, 2, 32)})


def test_devices_must_agree():
    with pytest.raises(RuntimeError, match="k must be on cpu"):
        raw(k=z(2, 12, 2, 16, device="meta"))
    with pytest.raises(RuntimeError, match="k must be on cpu"):
        func(k=z(2, 12, 2, 16, device="meta"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_devices_must_agree_with_a_gpu():
    with pytest.raises(RuntimeError, match="k must be on CUDA"):
        raw(*(x.cuda() if i != 1 else x for i, x in enumerate(qkv())))


@pytest.mark.parametrize("is_paged", [False, True])
def test_append_beyond_the_capacity_writes_nothing(is_paged):
    options = table() if is_paged else {"k_cache": z(2, 12, 2, 32), "v_cache": z(2, 12, 2, 32)}
    full = torch.tensor([512 if is_paged else 12, 0], dtype=I32)
    ones = {"k": z(2, 3, 2, 32) + 1, "v": z(2, 3, 2, 32) + 1}
    with pytest.raises(RuntimeError, match="block_table" if is_paged else "k_cache"):
        kvcache(**options, **ones, cache_seqlens=full)
    assert not options["k_cache"].any()


def test_a_refused_append_writes_nothing():
    cache = z(2, 12, 2, 32)
    ones = {"k": z(2, 3, 2, 32) + 1, "v": z(2, 3, 2, 32) + 1}
    with pytest.raises(RuntimeError, match="alibi_slopes must have shape"):
        kvcache(k_cache=cache, **ones, **lengths(), alibi_slopes=z(3))
    assert not cache.any()


def test_schema_refuses_none_where_a_number_belongs():
    with pytest.raises(RuntimeError, match="softmax_scale"):
        interface._flash_attn_forward(*qkv(), 0.0, None, False, -1, -1, 0.0, None, False)
