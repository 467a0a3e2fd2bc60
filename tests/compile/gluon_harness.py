"""Compile Gluon kernels without a GPU and read what ptxas made of their loops."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from harness import Launch, parse_target, report
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler.compiler import make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import create_function_from_signature

HOPPER = "cuda:90"
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_BRANCH = re.compile(r"\bBRA(?:\.\w+)*\b.*`\((\.L_x_\d+)\)")
_WAIT = re.compile(r"WARPGROUP\.DEPBAR.*gsb0, 0x(\d)")


class HopperReport(NamedTuple):
    """What the compiler made of a warp-specialised kernel."""

    shared: int  # bytes
    register_caps: set[int]  # what setmaxnreg asks for
    warnings: list[str]  # ptxas's advice: serialised products, ignored register caps
    assembly: str  # SASS
    loops: list[list[str]]  # SASS of the innermost loops that hold matrix products


def compile_gluon(launch: Launch) -> triton.compiler.CompiledKernel:
    """Compile through Triton's own argument binder, so the specialisation is that of a real launch."""
    where = parse_target(HOPPER)
    backend = make_backend(where)
    kernel, options = launch.kernel, {"debug": False, **launch.options}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, parsed = binder(*launch.args, **options)
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, parsed)
    source = GluonASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=where, options=parsed.__dict__)


def _advice(ptx: str) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(source), "-o", str(Path(folder, "kernel.o"))]
        log = subprocess.run(command, check=True, capture_output=True, text=True)
    return [line for line in (log.stdout + log.stderr).splitlines() if re.search(r"warning|C75\d\d", line)]


def _innermost_loops(assembly: str) -> list[list[str]]:
    lines = assembly.splitlines()
    labels = {m.group(1): i for i, line in enumerate(lines) if (m := _LABEL.match(line))}
    ranges = [
        (labels[m.group(1)], i)
        for i, line in enumerate(lines)
        if (m := _BRANCH.search(line)) and labels.get(m.group(1), i) < i
    ]
    inner = [a for a in ranges if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in ranges)]
    return [lines[first : last + 1] for first, last in inner]


def inspect(launch: Launch) -> HopperReport:
    """Compile a launch for Hopper and report."""
    compiled = compile_gluon(launch)
    found = report(compiled)
    loops = [loop for loop in _innermost_loops(found.assembly) if any("HGMMA" in line for line in loop)]
    caps = {int(n) for n in re.findall(r"setmaxnreg\.\w+\S*\s+(\d+)", compiled.asm["ptx"])}
    return HopperReport(found.shared, caps, _advice(compiled.asm["ptx"]), found.assembly, loops)


def between_waits(loop: list[str], instruction: str) -> int:
    """How many of an instruction stand between the wait that leaves one group of products pending and the next wait.

    The compiler may only order; if it moves the second wait up, nothing runs beside the tensor cores any more.
    """
    count, is_inside = 0, False
    for line in loop:
        if found := _WAIT.search(line):
            if is_inside:
                return count
            is_inside = found.group(1) == "1"
        elif is_inside and instruction in line:
            count += 1
    return count
