"""Run the comparison, print it, plot it and let the trained model write."""

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path

# Both are read when torch is loaded. Its profiler, which measures memory, chats otherwise; and threads that wait by
# spinning make every step many times slower as soon as another program wants the cores.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from demo import text, weights
from demo.attention import CONTENDERS
from demo.memory import Peaks, attention_peak, can_measure
from demo.model import Size, generate
from demo.train import Learner, Plan, train

PICTURE = Path("demo-results/flash_attn-vs-standard.png")
CORPUS_BYTES = 4_000_000
# The runs round differently and training amplifies that, so whole-run agreement is looser than that of the first
# step, where both models still have the same weights. In nats per byte.
FIRST_STEP_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
FINAL_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 5e-2}


def choose_device() -> torch.device:
    """The accelerator of this machine when there is one, else the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def make_plan(device: torch.device) -> Plan:
    """A model that the device trains within a minute or so."""
    if device.type == "cpu":
        size = Size(layers=4, heads=4, head_dim=32, seqlen=256)
        return Plan(device, torch.float32, size, batch=8, steps=180, learning_rate=3e-3, seed=1)
    dtype = torch.bfloat16 if device.type in ("cuda", "xpu") else torch.float32
    size = Size(layers=6, heads=6, head_dim=64, seqlen=1024)
    return Plan(device, dtype, size, batch=16, steps=300, learning_rate=1e-3, seed=1)


def measure_memory(plan: Plan) -> tuple[dict[str, Peaks], torch.device]:
    """Peak bytes of each attention at growing lengths for one sequence, and the device they were measured on."""
    device = plan.device if can_measure(plan.device) else torch.device("cpu")
    lengths = [256, 512, 1024, 2048, 4096] if device.type == "cpu" else [1024, 2048, 4096, 8192, 16384]
    dtype = plan.dtype if device == plan.device else torch.float32
    shape = (plan.size.heads, plan.size.head_dim)
    peaks = {
        name: {length: attention_peak(attention, device, dtype, length, *shape) for length in lengths}
        for name, attention in CONTENDERS.items()
    }
    return peaks, device


def print_comparison(runs: dict[str, Learner], memory: dict[str, Peaks]) -> None:
    """Loss, speed and memory of both, one line each."""
    lengths = list(next(iter(memory.values())))
    ends = (lengths[0], lengths[-1])
    print(f"\n{'attention':<12}{'final loss':>12}{'tokens/s':>12}", *(f"{f'memory at {n}':>18}" for n in ends), sep="")
    for name, run in runs.items():
        peaks = [memory[name][n] for n in ends]
        cells = ["out of memory" if peak is None else f"{peak / 1e6:,.1f} MB" for peak in peaks]
        print(f"{name:<12}{run.final_loss:>12.4f}{run.tokens_per_second:>12,.0f}", *(f"{c:>18}" for c in cells), sep="")
    print("(memory: peak of one attention call, forward and backward, beyond its inputs)")


def losses_agree(runs: dict[str, Learner], dtype: torch.dtype) -> bool:
    """Whether both models learned the same; prints the differences and their tolerances."""
    a, b = runs.values()
    checks = [
        ("first step", abs(a.losses[0] - b.losses[0]), FIRST_STEP_TOLERANCE[dtype]),
        ("final", abs(a.final_loss - b.final_loss), FINAL_TOLERANCE[dtype]),
    ]
    agreed = True
    for what, difference, tolerance in checks:
        is_fine = difference <= tolerance  # false for NaN too
        agreed &= is_fine
        print(f"{what} losses differ by {difference:.1e}, {'within' if is_fine else 'NOT within'} {tolerance:.0e}")
    return agreed


def describe(plan: Plan) -> str:
    """The training run in a few words."""
    size = plan.size
    dtype = str(plan.dtype).removeprefix("torch.")
    return (
        f"{size.layers} layers, width {size.width}, {plan.batch} sequences of {size.seqlen} bytes,"
        f" {dtype} on {plan.device.type}"
    )


def draw(plan: Plan, runs: dict[str, Learner], memory: dict[str, Peaks], memory_device: torch.device) -> None:
    """Save the plot, or say what it needs."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed (pip install matplotlib)")
        return
    from demo import plot

    shape = f"1 sequence, {plan.size.heads} heads of {plan.size.head_dim}, causal, on {memory_device.type}"
    plot.save(PICTURE, {name: run.losses for name, run in runs.items()}, memory, describe(plan), shape)
    print(f"plot: {PICTURE}")


def main() -> int:
    """Exit status: 0 when both losses agree."""
    argparse.ArgumentParser(prog="python -m demo", description=__doc__).parse_args()
    started = time.perf_counter()
    plan = make_plan(choose_device())
    print(f"Training a byte-level GPT on Python's standard library: {describe(plan)}")
    data = text.batches(text.load(CORPUS_BYTES), plan.steps, plan.batch, plan.size.seqlen, plan.seed)
    runs = train(CONTENDERS, plan, data)
    memory, memory_device = measure_memory(plan)
    print_comparison(runs, memory)
    agreed = losses_agree(runs, plan.dtype)
    draw(plan, runs, memory, memory_device)
    weights.save(runs["flash_attn"].model, plan.size, weights.PATH)
    print(f"weights: {weights.PATH} (python -m examples.generate writes with them)")
    print("\nThe model trained on flash_attn continues 'def ':\n")
    with plan.autocast():
        print(generate(runs["flash_attn"].model, b"def ", 300, plan.size.seqlen, temperature=0.7, seed=plan.seed))
    print(f"\n{time.perf_counter() - started:.0f} s in all")
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
