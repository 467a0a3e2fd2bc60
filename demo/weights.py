"""The trained model on disk, for whoever wants to do something with it."""

from dataclasses import asdict, replace
from pathlib import Path

import torch

from demo import text
from demo.attention import flash
from demo.model import GPT, Size
from demo.train import Plan, train

PATH = Path("demo-results/gpt.pt")


def save(model: GPT, size: Size, path: Path) -> None:
    """Keep the weights and the shape."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"size": asdict(size), "weights": model.state_dict()}, path)


def load(device: torch.device, path: Path) -> tuple[GPT, Size]:
    """What `save` kept."""
    stored = torch.load(path, map_location=device, weights_only=True)
    model, size = GPT(Size(**stored["size"]), flash).to(device), Size(**stored["size"])
    model.load_state_dict(stored["weights"])
    return model, size


def load_or_train(plan: Plan, steps: int = 60, corpus_bytes: int = 1_000_000) -> tuple[GPT, Size]:
    """The model on disk, or where there is none one that is trained now, for a few steps of the plan."""
    if PATH.exists():
        return load(plan.device, PATH)
    print(f"{PATH} is not there (`make demo` writes it), so here is a short training:")
    plan = replace(plan, steps=steps)
    data = text.batches(text.load(corpus_bytes), plan.steps, plan.batch, plan.size.seqlen, plan.seed)
    return train({"flash_attn": flash}, plan, data)["flash_attn"].model, plan.size
