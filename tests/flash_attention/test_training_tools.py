"""The modules under PyTorch's tools: compilers, checkpointing, mixed precision, data parallelism."""

import copy

import pytest
import torch
import torch.distributed as dist
from parallel_training import CHECKS, WORLD, run_checks
from torch import nn
from torch.utils.checkpoint import checkpoint

from flash_attention import FlashAttention, MultiHeadFlashAttention
from flash_attn_plus.testing import assert_close

KEEP = torch.tensor([[True] * 8 + [False] * 4, [False] * 5 + [True] * 7])


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(device: str = "cpu", **options) -> MultiHeadFlashAttention:
    torch.manual_seed(0)
    return MultiHeadFlashAttention(32, 4, 2, causal=True, rotary_dim=8, **options).to(device)


def features(device: str = "cpu", length: int = 12) -> torch.Tensor:
    x = torch.randn(2, length, 32, generator=torch.Generator().manual_seed(length))
    return x.to(device).requires_grad_()


def results(function, module: nn.Module, *args, **kwargs) -> tuple:
    """Output and gradients of the first argument and of the parameters."""
    out = function(*args, **kwargs)
    return out, torch.autograd.grad(out.float().square().sum(), (args[0], *module.parameters()))


def test_full_graph_with_a_mask(device):
    module, x, keep = make(device), features(device), KEEP.to(device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        results(compiled, module, x, key_padding_mask=keep), results(module, module, x, key_padding_mask=keep)
    )


def test_generated_code(device):
    """By Inductor, which is slow to compile: attention of keys with padding, without gradients."""
    module, x, keep = make(device), features(device), KEEP.to(device)
    with torch.no_grad():
        found = torch.compile(module, fullgraph=True)(x, key_padding_mask=keep)
        torch.testing.assert_close(found, module(x, key_padding_mask=keep))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="max-autotune is for GPUs")
def test_max_autotune():
    module, x, keep = make("cuda"), features("cuda"), KEEP.cuda()
    compiled = torch.compile(module, fullgraph=True, mode="max-autotune")
    torch.testing.assert_close(
        results(compiled, module, x, key_padding_mask=keep), results(module, module, x, key_padding_mask=keep)
    )


@pytest.mark.parametrize("has_mask", [False, True])
def test_changing_lengths_do_not_recompile_forever(has_mask, device):
    module, graphs = make(device), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, backend=backend)
    with torch.no_grad():
        for length in (5, 9, 14, 21, 40):
            x = features(device, length)
            keep = torch.arange(length, device=device).expand(2, -1) < length - 2 if has_mask else None
            torch.testing.assert_close(compiled(x, key_padding_mask=keep), module(x, key_padding_mask=keep))
    assert len(graphs) == 2


def test_lists_in_a_full_graph(device):
    module = make(device)
    items = [torch.randn(n, 32, device=device, requires_grad=True) for n in (3, 7, 4)]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = [torch.autograd.grad(sum(o.square().sum() for o in f(items)), items) for f in (compiled, module)]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("longest", [None, 7], ids=["unknown", "known"])
def test_nested_tensors_in_a_full_graph(longest, device):
    rows = torch.randn(14, 4, 8, device=device, requires_grad=True)
    offsets = torch.tensor([0, 3, 10, 14], device=device)
    module, found = FlashAttention(causal=True), []
    for function in (torch.compile(module, fullgraph=True, backend="aot_eager"), module):
        q = torch.nested.nested_tensor_from_jagged(rows, offsets, max_seqlen=longest).transpose(1, 2)
        out = function(q, q, q).values()
        found.append((out, torch.autograd.grad(out.square().sum(), rows)))
    torch.testing.assert_close(*found)


def test_generation_in_a_full_graph(device):
    module, x, graphs = make(device), features(device), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(lambda token, cache: module(token, cache=cache), fullgraph=True, backend=backend)
    with torch.no_grad():
        cache = module.make_cache(2, 12)
        found = torch.cat([step(token, cache) for token in x.split(1, 1)], 1)
        torch.testing.assert_close(found, module(x))
    assert len(graphs) <= 3


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_the_dropout(use_reentrant, device):
    module, x, keep = make(device, dropout=0.4), features(device), KEEP.to(device)
    found = []
    for run in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=use_reentrant)):
        torch.manual_seed(1)
        module.zero_grad()
        x.grad = None
        out = run(module, x, None, keep)
        out.square().sum().backward()
        found.append((out, x.grad, [p.grad for p in module.parameters()]))
    torch.testing.assert_close(*found, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, device):
    module, x, keep = make(device), features(device), KEEP.to(device)
    with torch.autocast(device, dtype):
        out, gradients = results(module, module, x, key_padding_mask=keep)
    assert out.dtype == dtype
    assert {g.dtype for g in gradients} == {torch.float32}
    low, double = copy.deepcopy(module).to(dtype), copy.deepcopy(module).double()
    plain = results(low, low, x.detach().to(dtype).requires_grad_(), key_padding_mask=keep)
    exact = results(double, double, x.detach().double().requires_grad_(), key_padding_mask=keep)
    assert_close("out", out, exact[0], plain[0])
    for name, *values in zip(("x", *dict(module.named_parameters())), gradients, exact[1], plain[1], strict=True):
        assert_close(name, *values)


def test_gradient_scaler_trains(device):
    module, x = make(device, dropout=0.1), features(device).detach()
    optimizer, scaler = torch.optim.AdamW(module.parameters(), lr=1e-2), torch.amp.GradScaler(device)
    losses = []
    for _ in range(30):
        with torch.autocast(device, torch.float16):
            loss = (module(x, key_padding_mask=KEEP.to(device)) - x).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_inference_mode(device):
    module, x, keep = make(device).eval(), features(device), KEEP.to(device)
    expected = module(x, key_padding_mask=keep)
    with torch.inference_mode():
        out = module(x, key_padding_mask=keep)
        items = module([x[0], x[1, :4]])
    assert out.is_inference()
    assert torch.equal(out, expected)
    torch.testing.assert_close(items[0], module(x[:1])[0])


def test_exported(device):
    module, x, keep = make(device).eval(), features(device), KEEP.to(device)
    length = torch.export.Dim("length", min=2, max=512)
    program = torch.export.export(module, (x, None, keep), dynamic_shapes=({1: length}, None, {1: length}))
    other, shown = features(device, 31), torch.arange(31, device=device).expand(2, -1) % 5 > 0
    torch.testing.assert_close(program.module()(other, None, shown), module(other, None, shown))


def test_deep_copies_and_pickles(tmp_path, device):
    module = nn.Sequential(make(device, alibi_slopes=torch.full((4,), 0.3)))
    torch.save(module, tmp_path / "module.pt")
    x = features(device)
    for other in (copy.deepcopy(module), torch.load(tmp_path / "module.pt", weights_only=False)):
        assert torch.equal(other(x), module(x))


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> list[dict[str, str]]:
    """What went wrong on each rank; all checks run in one pair of processes, because starting them takes long."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_checks, args=(str(folder / "store"), str(folder / "results")), nprocs=WORLD)
    return [torch.load(f"{folder / 'results'}.{rank}") for rank in range(WORLD)]


@pytest.mark.skipif(not dist.is_available(), reason="PyTorch was built without torch.distributed")
@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(name, failures):
    for rank, failed in enumerate(failures):
        assert name not in failed, f"rank {rank}: {failed[name]}"


def test_flash_attention_module_in_a_full_graph(device):
    q, k, v = (torch.randn(2, 4, 12, 8, device=device, requires_grad=True) for _ in range(3))
    module = FlashAttention(window_size=(3, 1), softcap=2.0).to(device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for mask in (None, KEEP.to(device)):
        found = []
        for function in (compiled, module):
            out, lse = function(q, k, v, mask, return_lse=True)
            found.append(torch.autograd.grad(out.sum() + lse.where(lse.isfinite(), 0.0).sum(), (q, k, v)))
        torch.testing.assert_close(*found)
