"""What is installed, which devices there are, which backend serves on each, and the state of Triton's compiler.

With --explain, every backend's reasons for one call instead, in words that attention's arguments suggest:
  flash-attn-plus info --explain "s=8192 h=32 hk=8 d=128 causal grad"
Words: b s sq sk h hk d dv (sizes; s is both lengths), dtype=bf16|fp16|fp32|fp64, device=cpu|cuda:1, causal, window=L,R,
softcap[=X], alibi, dropout[=P], varlen, page=SIZE, seqused, leftpad, grad, deterministic.
The exit code is 1 when no backend serves the call.
"""

import argparse
import importlib.util
import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import flash_attn_plus
from flash_attn_plus import device, env, selection
from flash_attn_plus.backends.triton_portable import is_interpreted
from flash_attn_plus.cli import output, words
from flash_attn_plus.cli.shapes import shapes_of
from flash_attn_plus.errors import InvalidArgument
from flash_attn_plus.tuning import table

SUMMARY = "versions, devices, backends and why; --explain for one call"
TYPICAL = "b=4 s=4096 h=16 d=128 dtype=bf16 causal"
_PACKAGES = ("triton", "numpy", "einops", "flag_gems", "flash-attn-4", "xformers", "rich", "matplotlib")
_VARIABLES = tuple(value for name, value in vars(env).items() if name.isupper() and isinstance(value, str))
_TRITON_VARIABLES = ("TRITON_INTERPRET", "TRITON_CACHE_DIR", "CUDA_VISIBLE_DEVICES")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `info`."""
    parser.add_argument("--explain", metavar="CALL", help="tell every backend's reasons for a call in words")


def run(arguments: argparse.Namespace) -> int:
    """Print what is here, or the reasons for one call."""
    if arguments.explain is not None:
        return explain(arguments.explain, arguments.json)
    found = gather()
    output.print_json(found) if arguments.json else show(found)
    return 0


def versions() -> dict[str, str]:
    """Names and versions of everything that takes part, as far as it is installed."""
    found = {"flash_attn_plus": flash_attn_plus.__version__, "flash_attn": flash_attn_kind()}
    found |= {"python": platform.python_version(), "system": platform.platform(), "torch": torch.__version__}
    if toolkit := torch.version.cuda or torch.version.hip:
        found["torch's " + ("HIP" if torch.version.hip else "CUDA")] = toolkit
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def flash_attn_kind() -> str:
    """Which flash_attn other libraries would import: ours, the original, or none; nothing is imported."""
    if importlib.util.find_spec("flash_attn") is None:
        return "not installed"
    extension = importlib.util.find_spec("flash_attn_2_cuda")
    if extension is None:
        return "installed, without the extension of FlashAttention-2"
    is_ours = (extension.origin or "").endswith(".py")
    return "our drop-in, interface 2.8.3" if is_ours else f"the original ({extension.origin})"


def devices() -> list[dict[str, Any]]:
    """Every device that PyTorch sees, the CPU last."""
    found = []
    here = words.default_device()
    if here.type != "cpu":
        for index in range(torch.accelerator.device_count()):
            found.append(_accelerator(torch.device(here.type, index)))
    capability = torch.backends.cpu.get_cpu_capability()
    found.append({"device": "cpu", "name": processor(), "capability": capability, "threads": torch.get_num_threads()})
    return found


def _accelerator(where: torch.device) -> dict[str, Any]:
    facts, tell = device.probe(where), getattr(torch.get_device_module(where), "get_device_properties", None)
    found = {
        "device": str(where), "name": words.device_name(where), "family": facts.family,
        "processors": facts.processors, "shared memory": f"{facts.shared_memory // 1024} KB",
    }  # fmt: skip
    memory = getattr(tell(where), "total_memory", None) if tell else None
    return found if memory is None else found | {"memory": f"{memory / 2**30:.1f} GiB"}


def processor() -> str:
    """The CPU's name, as the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def backends(where: torch.device) -> list[dict[str, Any]]:
    """Every backend's answer to a typical forward and backward pass on a device."""
    call = words.read_call(TYPICAL)
    shapes = shapes_of(call.case, call.dtype)
    answers: dict[str, dict[str, Any]] = {}
    for pass_name, is_backward in (("forward", False), ("backward", True)):
        try:
            verdicts = list(selection.explain_problem(shapes.problem(where, is_backward)))
        except InvalidArgument as error:  # a variable or a table of tiles that is wrong, as the call would say
            raised = f"calls raise: {error}"
            return [{"backend": "every", "device": str(where), "forward": raised, "backward": raised}]
        for verdict in verdicts:
            answer = answers.setdefault(verdict.name, {"backend": verdict.name, "device": str(where)})
            answer[pass_name] = "chosen" if verdict.is_chosen else "; ".join(verdict.reasons) or "usable"
    return list(answers.values())


def triton_state() -> dict[str, Any]:
    """Triton's version, assembler, host compiler and cache; why not, where it is missing."""
    if importlib.util.find_spec("triton") is None:
        return {"triton": "not installed; the kernels need it (it comes with PyTorch's GPU builds)"}
    import triton
    from triton import knobs

    found: dict[str, Any] = {"version": triton.__version__, "interpreter": "on" if is_interpreted() else "off"}
    try:
        assembler = knobs.nvidia.ptxas
        found["ptxas"] = f"{assembler.version} ({assembler.path})"
    except (RuntimeError, AttributeError, OSError) as error:
        found["ptxas"] = f"not usable: {error}"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    found["host compiler"] = compiler or "none: install gcc or set CC; the first launch of a kernel needs it"
    return found | cache_state(Path(knobs.cache.dir))


def cache_state(folder: Path) -> dict[str, Any]:
    """What lies in a folder of compiled kernels, and whether more can be put there."""
    parent = next((p for p in (folder, *folder.parents) if p.exists()), folder)
    files = [Path(at, name) for at, _, names in os.walk(folder) for name in names]
    sizes = [p.stat().st_size for p in files if p.exists()]  # other processes come and go
    binaries = [p for p in files if p.suffix in (".cubin", ".hsaco")]
    is_writable = parent.is_dir() and os.access(parent, os.W_OK)
    return {
        "cache": str(folder),
        "cache kernels": len(binaries),
        "cache size": f"{sum(sizes) / 2**20:.1f} MiB",
        "cache writable": "yes" if is_writable else "no: every process compiles; set TRITON_CACHE_DIR",
    }


def tuning_state() -> str:
    """Which table of measured tiles is in use."""
    path = env.tuning_table()
    if path is None:
        return f"none ({env.TUNING_TABLE} is not set): the built-in tables decide"
    try:
        entries = [entry for group in table.load(path).values() for entry in group]
    except InvalidArgument as error:
        return str(error)
    families = sorted({entry.key.family for entry in entries})
    return f"{path}: {len(entries)} entries for {', '.join(families) or 'no device'}"


def gather() -> dict[str, Any]:
    """Everything that `info` tells."""
    here = devices()
    return {
        "versions": versions(),
        "devices": here,
        "typical call": TYPICAL,
        "backends": [row for d in here for row in backends(torch.device(d["device"]))],
        "triton": triton_state(),
        "tuning table": tuning_state(),
        "environment": {name: os.environ[name] for name in (*_VARIABLES, *_TRITON_VARIABLES) if name in os.environ},
    }


def show(found: dict[str, Any]) -> None:
    """Print what `gather` found."""

    def pairs(title: str, content: dict[str, Any]) -> None:
        output.say("", title)
        output.print_pairs(content)

    output.say(f"FlashAttention-Plus {flash_attn_plus.__version__} ({Path(flash_attn_plus.__file__).parent})")
    pairs("Versions", found["versions"])
    for facts in found["devices"]:
        pairs(f"Device {facts['device']}", {k: v for k, v in facts.items() if k != "device"})
    output.say("", f'Backends, for "{found["typical call"]}"')
    rows = [
        (f"  {row['device']}", row["backend"], pass_name, row[pass_name])
        for row in found["backends"]
        for pass_name in _passes(row)
    ]
    output.print_table(("  device", "backend", "pass", "answer"), rows)
    pairs("Triton", found["triton"])
    output.say("", f"Tuning table: {found['tuning table']}")
    pairs("Environment", found["environment"]) if found["environment"] else output.say("Environment: nothing set")
    output.say("", 'One call: flash-attn-plus info --explain "s=8192 hk=8 causal grad"')


def _passes(row: dict[str, Any]) -> tuple[str, ...]:
    """Both passes in one line where the answer is the same."""
    if row["forward"] != row["backward"]:
        return ("forward", "backward")
    row["both"] = row["forward"]
    return ("both",)


def explain(text: str, as_json: bool) -> int:
    """Print every backend's reasons for a call in words."""
    call = words.read_call(text)
    shapes = shapes_of(call.case, call.dtype)
    told: dict[str, Any] = {}
    is_served = True
    for is_backward in (False, True) if call.has_gradients else (False,):
        problem = shapes.problem(call.device, is_backward, is_backward and call.is_deterministic)
        verdicts = selection.explain_problem(problem)
        told["backward" if is_backward else "forward"] = verdicts
        is_served &= any(v.is_chosen for v in verdicts)
    if as_json:
        content = {name: [v._asdict() for v in verdicts] for name, verdicts in told.items()}
        output.print_json({"call": text, "device": str(call.device), "served": is_served} | content)
        return 0 if is_served else 1
    c = call.case
    sizes = f"b={c.batch} sq={c.seqlen_q} sk={c.seqlen_k} h={c.heads} hk={c.heads_k} d={c.head_dim}"
    output.say(f"sizes: {sizes} dtype={words.name_of(call.dtype)}")
    for name, verdicts in told.items():
        output.say(f"{name} on {call.device}")
        answers = ["; ".join(v.reasons) or ("ok  <- chosen" if v.is_chosen else "ok") for v in verdicts]
        output.print_table(
            ("  backend", "answer"), [(f"  {v.name}", a) for v, a in zip(verdicts, answers, strict=True)]
        )
    if not is_served:
        print("no backend serves this call; change what the reasons name", file=sys.stderr)
    return 0 if is_served else 1
