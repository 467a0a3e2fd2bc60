"""The training runs: seed, data and schedule are the same for every attention."""

import time
from dataclasses import dataclass
from statistics import fmean, median

import torch
from torch import Tensor
from torch.nn import functional as F

from demo.attention import Attention
from demo.model import GPT, Size


@dataclass(frozen=True)
class Plan:
    """What is trained, on what and for how long."""

    device: torch.device
    dtype: torch.dtype  # of activations; weights and optimizer state stay float32
    size: Size
    batch: int
    steps: int
    learning_rate: float
    seed: int

    def autocast(self) -> torch.autocast:
        """The context in which the model computes."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


class Learner:
    """One model with its optimizer and what is known of its run so far."""

    def __init__(self, attention: Attention, plan: Plan) -> None:
        torch.manual_seed(plan.seed)
        self.plan = plan
        self.model = GPT(plan.size, attention).to(plan.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
        )
        self.losses: list[float] = []  # nats per byte, one for each step
        self.seconds: list[float] = []

    def step(self, window: Tensor) -> None:
        """Learn from one int64 window (batch, seqlen + 1)."""
        plan, started = self.plan, time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = _rate(plan, len(self.losses))
        with plan.autocast():
            logits = self.model(window[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        if plan.device.type != "cpu":
            torch.accelerator.synchronize(plan.device)
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - started)

    @property
    def tokens_per_second(self) -> float:
        """From the median step, so that compilation and other programs of the machine do not count."""
        return self.plan.batch * self.plan.size.seqlen / median(self.seconds)

    @property
    def final_loss(self) -> float:
        """Mean of the last tenth of the steps."""
        return fmean(self.losses[-max(1, len(self.losses) // 10) :])


def _rate(plan: Plan, step: int) -> float:
    """Linear warm-up over a tenth of the steps, then linear decay to a tenth of the peak."""
    warmup = max(1, plan.steps // 10)
    done = (step - warmup) / max(1, plan.steps - warmup)
    return plan.learning_rate * ((step + 1) / warmup if step < warmup else 1.0 - 0.9 * done)


def train(attentions: dict[str, Attention], plan: Plan, data: Tensor) -> dict[str, Learner]:
    """Train one model with each attention on data (steps, batch, seqlen + 1), in turns, printing progress.

    Taking turns step by step lets whatever else the machine does weigh on all of them alike.
    """
    learners = {name: Learner(attention, plan) for name, attention in attentions.items()}
    started = time.perf_counter()
    for step, window in enumerate(data.to(plan.device), 1):
        for learner in learners.values():
            learner.step(window)
        if step == 1 or step % max(1, plan.steps // 10) == 0:
            losses = "  ".join(f"{name} {learner.losses[-1]:.3f}" for name, learner in learners.items())
            print(f"  step {step:>4}/{plan.steps}  loss: {losses}  {time.perf_counter() - started:5.0f} s", flush=True)
    return learners
