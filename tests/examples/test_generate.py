"""The generation example writes what the demo's model would, token for token."""

import re
import sys

import pytest
import torch

from demo import __main__ as demo_program
from demo import weights
from demo.attention import flash
from demo.model import GPT, Size

SIZE = Size(layers=2, heads=2, head_dim=32, seqlen=48)


@pytest.fixture
def model(device: str) -> GPT:
    torch.manual_seed(0)
    return GPT(SIZE, flash).to(device)


@torch.no_grad()
def without_cache(model: GPT, prompt: bytes, length: int) -> bytes:
    tokens = torch.tensor([list(prompt)], device=model.embedding.weight.device)
    for _ in range(length):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), dim=1)
    return bytes(tokens[0, len(prompt) :].tolist())


def test_greedy_bytes_are_those_of_the_model_without_a_cache(example, model, device):
    writer = example("generate").Writer(model, SIZE, torch.float32)
    written, speed = writer.write(b"def ", 40, 0.0, is_graph=False)
    assert written == without_cache(model, b"def ", 40)
    assert speed > 0
    again, _ = writer.write(b"x = ", 40, 0.0, is_graph=False)
    assert again == without_cache(model, b"x = ", 40), "the first text must be forgotten"


def test_sampling_follows_the_seed_and_the_temperature(example, model):
    writer = example("generate").Writer(model, SIZE, torch.float32)

    def sample(seed: int, temperature: float) -> bytes:
        torch.manual_seed(seed)
        return writer.write(b"def ", 40, temperature, is_graph=False)[0]

    assert sample(1, 1.0) == sample(1, 1.0) != sample(2, 1.0)
    assert sample(1, 1e-4) == sample(2, 1e-4) == writer.write(b"def ", 40, 0.0, is_graph=False)[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_writes_what_eager_steps_do(example, model, device):
    if device != "cuda":
        pytest.skip("the device under test is not a GPU")
    writer = example("generate").Writer(model, SIZE, torch.bfloat16)
    eager, graph = (writer.write(b"def ", 40, 0.0, is_graph)[0] for is_graph in (False, True))
    assert eager == graph


def test_it_takes_saved_weights_and_trains_without(example, model, device, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(weights, "PATH", tmp_path / "gpt.pt")
    plan = example("generate").make_plan(torch.device(device))
    briefly, size = weights.load_or_train(plan, steps=1, corpus_bytes=50_000)
    assert "short training" in capsys.readouterr().out
    assert size == plan.size
    assert briefly.blocks[0].heads == size.heads
    weights.save(model, SIZE, weights.PATH)
    loaded, size = weights.load_or_train(plan)
    assert size == SIZE
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_it_says_how_fast_each_way_is(example, model, device, monkeypatch, capsys):
    module = example("generate")
    monkeypatch.setattr(module, "load_or_train", lambda plan: (model, SIZE))
    module.main()
    ways = re.findall(r"^--- (\w+), (eager|CUDA graph): [\d,]+ tokens a second$", capsys.readouterr().out, re.MULTILINE)
    assert ways[:2] == [("greedy", "eager"), ("sampled", "eager")]
    assert len(ways) == (4 if module.choose_device().type == "cuda" else 2)


def test_the_demo_trains_nothing_for_arguments_that_it_does_not_know(monkeypatch, capsys):
    monkeypatch.setattr(demo_program, "train", None)
    monkeypatch.setattr(sys, "argv", ["demo", "--steps=3"])
    with pytest.raises(SystemExit, match="2"):
        demo_program.main()
    assert "unrecognized arguments: --steps=3" in capsys.readouterr().err
