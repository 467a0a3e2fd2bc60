"""Compilers and autograd's companions: torch.compile, torch.export, opcheck, checkpointing, autocast."""

from types import SimpleNamespace

import flash_attn
import pytest
import torch
from flash_attn import flash_attn_interface as interface
from torch.utils.checkpoint import checkpoint

import flash_attn_plus
from flash_attn_plus.testing import Case, make_inputs

FUNCTIONS = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
]
BASE = Case(batch=3, seqlen_q=20, seqlen_k=33, heads=4, heads_k=2, head_dim=24, right=0)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, **options):
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize("is_dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_full_graph_with_gradients(name, is_dynamic, invoke):
    made = invoke(name, BASE)
    function = made.function
    expected = made.results()
    made.function = compiled(lambda *args, **options: function(*args, **options), dynamic=is_dynamic)
    for key, x in made.results().items():
        assert torch.equal(x, expected[key]), key


@pytest.mark.parametrize("name", ["flash_attn_func", "flash_attn_varlen_qkvpacked_func"])
def test_full_graph_with_dropout_and_dump(name, invoke):
    made = invoke(name, BASE._replace(dropout_p=0.3))
    function = made.function
    expected = made(return_attn_probs=True)
    made.function = compiled(lambda *args, **options: function(*args, **options))
    for a, b in zip(made(return_attn_probs=True), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "name", ["attention", "flash_attn_func", "flash_attn_varlen_func", "flash_attn_varlen_kvpacked_func"]
)
def test_a_tensor_passed_twice_in_a_full_graph(name, device):
    """Self-attention passes the same starts for queries and keys, and may pass the same tensor as keys and values."""
    x = torch.randn(12, 2, 16, device=device, requires_grad=True)
    kv = torch.randn(12, 2, 2, 16, device=device, requires_grad=True)
    starts = torch.tensor([0, 5, 12], dtype=torch.int32, device=device)

    def attend(x, kv, starts):
        same = x[None]
        if name == "attention":
            return flash_attn_plus.attention(same, same, same, causal=True)
        if name == "flash_attn_func":
            return flash_attn.flash_attn_func(same, same, same, causal=True)
        tensors = (x, kv) if "kvpacked" in name else (x, x, x)
        return getattr(flash_attn, name)(*tensors, starts, starts, 7, 7, causal=True)

    leaves = [x, kv] if "kvpacked" in name else [x]
    expected = torch.autograd.grad(attend(x, kv, starts).square().sum(), leaves)
    grads = torch.autograd.grad(compiled(attend)(x, kv, starts).square().sum(), leaves)
    torch.testing.assert_close(grads, expected)  # the three gradients are summed in another order


def test_changing_lengths_do_not_recompile_forever(device):
    """The longest sequence becomes a symbolic integer; two graphs serve every length."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend)
    def attend(x, cu, longest):
        return flash_attn.flash_attn_varlen_func(x, x, x, cu, cu, longest, longest, causal=True)

    for length in (5, 9, 14, 21, 40):
        x = torch.randn(length + 3, 2, 16, device=device)
        cu = torch.tensor([0, length, length + 3], dtype=torch.int32, device=device)
        expected = flash_attn.flash_attn_varlen_func(x, x, x, cu, cu, length, length, causal=True)
        assert torch.equal(attend(x, cu, length), expected)
    assert len(graphs) == 2


def test_private_operators_in_a_full_graph(device):
    x = make_inputs(BASE, torch.float32, device).inputs

    @compiled
    def both(q, k, v):
        out, lse, _, state = interface._flash_attn_forward(q, k, v, 0.0, 0.2, True, -1, -1, 0.0, None, False)
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        interface._flash_attn_backward(out, q, k, v, out, lse, *grads, 0.0, 0.2, True, -1, -1, 0.0, None, False, state)
        return out, *grads

    out, lse, _, state = interface._flash_attn_forward(*x[:3], 0.0, 0.2, True, -1, -1, 0.0, None, False)
    grads = [torch.empty_like(t) for t in x[:3]]
    interface._flash_attn_backward(out, *x[:3], out, lse, *grads, 0.0, 0.2, True, -1, -1, 0.0, None, False, state)
    for a, b in zip(both(*x[:3]), (out, *grads), strict=True):
        assert torch.equal(a, b)


def test_kvcache_in_a_full_graph(device):
    q, k, v = (torch.randn(2, n, 2, 32, device=device) for n in (1, 1, 1))
    caches = [torch.randn(2, 40, 2, 32, device=device) for _ in range(2)]
    copies = [x.clone() for x in caches]
    lengths = torch.tensor([7, 30], dtype=torch.int32, device=device)
    expected = flash_attn.flash_attn_with_kvcache(q, *copies, k, v, cache_seqlens=lengths, causal=True)
    step = compiled(lambda *args: flash_attn.flash_attn_with_kvcache(*args, cache_seqlens=lengths, causal=True))
    assert torch.equal(step(q, *caches, k, v), expected)
    assert all(torch.equal(a, b) for a, b in zip(caches, copies, strict=True))


def test_export(device):
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            private = torch.ops.flash_attn._flash_attn_forward(q, k, v, 0.0, 0.25, True, -1, -1, 0.0, None, False)[0]
            return flash_attn.flash_attn_func(q, k, v, causal=True, softmax_scale=0.25) + private

    x = make_inputs(BASE, torch.float32, device).inputs
    length = torch.export.Dim("length", min=2, max=512)
    program = torch.export.export(Model(), tuple(x[:3]), dynamic_shapes=({1: length}, None, None))
    assert "flash_attn._flash_attn_forward.default" in str(program.graph)
    other = torch.randn(3, 11, 4, 24, device=device)
    with torch.no_grad():
        assert torch.equal(program.module()(other, x.k, x.v), Model()(other, x.k, x.v))


def _operator_calls(call):
    """Arguments for opcheck of the engine's and the interface's operators."""
    x = call.inputs
    sequences = (x.cu_seqlens_q, x.cu_seqlens_k, call.max_seqlen_q, call.max_seqlen_k)
    engine = (*sequences, None, None, None, x.alibi_slopes, None, 0.0, x.softmax_scale, call.left, call.right, 0.0)
    numbers = (0.0, x.softmax_scale, False, call.left, call.right, 0.0, x.alibi_slopes)
    out, lse = torch.ops.flash_attn_plus.forward(*x[:3], *engine)
    grads = [torch.zeros_like(t) for t in x[:3]]
    yield torch.ops.flash_attn_plus.forward.default, (*x[:3], *engine)
    yield torch.ops.flash_attn_plus.backward.default, (call.dout, *x[:3], out, lse, None, *grads, *engine, False)
    ops = torch.ops.flash_attn
    if x.cu_seqlens_q is None:
        yield ops._flash_attn_forward.default, (*x[:3], *numbers, False)
        yield ops._flash_attn_backward.default, (call.dout, *x[:3], out, lse, *grads, *numbers, False)
    else:
        yield ops._flash_attn_varlen_forward.default, (*x[:3], *sequences, *numbers)
        yield (
            ops._flash_attn_varlen_backward.default,
            (call.dout, *x[:3], out, lse, *grads, *sequences, *numbers, False),
        )
    state = torch.tensor([3, 4], device=x.q.device)
    yield (
        ops._softmax_dump.default,
        (*x[:3][:2], *sequences, None, None, None, x.alibi_slopes, state, 0.2, 0.3, call.left, call.right),
    )


@pytest.mark.parametrize("lengths", [None, (5, 12, 3)], ids=["dense", "varlen"])
@pytest.mark.parametrize("index", range(5))
def test_opcheck(index, lengths, device):
    call = make_inputs(BASE._replace(lengths_q=lengths, lengths_k=lengths, alibi="batch"), torch.float32, device)
    operator, args = list(_operator_calls(call))[index]
    torch.library.opcheck(operator, args)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_the_dropout(use_reentrant, invoke):
    made = invoke("flash_attn_func", BASE._replace(dropout_p=0.3))
    expected = made.results()
    torch.manual_seed(1234)
    out = checkpoint(lambda *args: made.function(*args, **made.options), *made.leaves, use_reentrant=use_reentrant)
    assert torch.equal(out, expected["out"])
    out.backward(made.call.dout)
    for leaf, key in zip(made.leaves, ("dq", "dk", "dv"), strict=True):
        assert torch.equal(leaf.grad, expected[key])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_autocast(name, invoke, device):
    half, full = invoke(name, BASE, torch.bfloat16), invoke(name, BASE, torch.float32)
    for a, b in zip(full.leaves, half.leaves, strict=True):
        a.data.copy_(b.data)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        out = full()
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, half())
    grads = torch.autograd.grad(out, full.leaves, half.call.dout)
    for grad, wanted in zip(grads, torch.autograd.grad(half(), half.leaves, half.call.dout), strict=True):
        assert grad.dtype == torch.float32
        assert torch.equal(grad, wanted.float())


def test_operators_show_themselves_to_dispatch_modes(invoke):
    """Selective checkpointing matches operators by name and reads `window_size_left` from the schema."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = SimpleNamespace(names=[])

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.names.append(str(function))
            return function(*args, **(kwargs or {}))

    made = invoke("flash_attn_func", BASE)
    with Recorder():
        made().sum().backward()
    assert [name for name in seen.names if "flash_attn" in name] == [
        "flash_attn_plus.forward.default",
        "flash_attn_plus.backward.default",
    ]
    assert "window_size_left" in str(torch.ops.flash_attn_plus.forward.default._schema)


def test_packed_gradients_are_written_whole_by_inductor_with_dynamic_sizes():
    """With every size symbolic Inductor hands slices of one tensor to an operator without their offsets."""
    qkv = torch.randn(2, 5, 3, 4, 16, requires_grad=True)
    function = flash_attn.flash_attn_qkvpacked_func
    expected, gradient = (
        torch.autograd.grad(f(qkv).square().sum(), qkv)[0]
        for f in (function, torch.compile(function, fullgraph=True, dynamic=True))
    )
    torch.testing.assert_close(gradient, expected)
