"""transformers' models over flash_attention_2 under torch.compile and selective activation checkpointing."""

from functools import partial

import pytest
import torch
from language_models import VOCABULARY, admit_cpu, decoder
from programs import operator_calls
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from flash_attn_plus import ops

admit_cpu()
LAYERS = 2


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


def gradients(model, logits) -> list[torch.Tensor]:
    model.zero_grad()
    logits.square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("form", ["dense", "packed"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "qwen2"])
def test_full_graph(name, form, device):
    """Forward and backward as one graph each, which equal the uncompiled ones bit for bit."""
    model = decoder(name, torch.bfloat16, device).flash  # in float32 transformers warns, which ends a graph
    options = {"use_cache": False}
    ids = tokens(2, 13).to(device)
    if form == "packed":  # for a batch of one, transformers reads the positions' values, which ends a graph
        starts = torch.tensor([0, 5, 13, 26], dtype=torch.int32, device=device)
        options |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 13, "max_length_k": 13}
    logits = model(ids, **options).logits
    expected = [logits.detach(), *gradients(model, logits)]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits = compiled(ids, **options).logits
    results = [logits.detach(), *gradients(model, logits)]
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    with operator_calls() as calls:
        gradients(model, compiled(ids, **options).logits)
    kind = "" if form == "dense" else " packed"
    assert calls == {"forward" + kind: LAYERS, "backward" + kind: LAYERS}


def test_lengths_that_change_make_two_graphs(device):
    model = decoder("llama", torch.bfloat16, device).flash
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for length in (9, 13, 21, 34):
            ids = tokens(2, length).to(device)
            assert torch.equal(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert len(graphs) == 2


def policy(context, operator, *args, **kwargs) -> CheckpointPolicy:
    """Keep what attention returns, by the part of the operator's name that trl and axolotl look for."""
    is_kept = "flash_attn" in str(operator) and "backward" not in str(operator)
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("is_selective", [False, True])
def test_selective_checkpointing_keeps_attention(is_selective, device, monkeypatch):
    model = decoder("llama", device=device).flash.train()
    ids = tokens(2, 13).to(device)
    expected = gradients(model, model(ids, use_cache=False).logits)
    settings = {"use_reentrant": False}
    if is_selective:
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    model.gradient_checkpointing_enable(settings)
    runs, state = [], ops.state  # asked for once in each pass; a profiler would count what is looked up again, too
    monkeypatch.setattr(ops, "state", lambda: runs.append(None) or state())
    results = gradients(model, model(ids, use_cache=False).logits)
    assert len(runs) == (2 if is_selective else 3) * LAYERS  # forward, backward and, without the choice, forward again
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
