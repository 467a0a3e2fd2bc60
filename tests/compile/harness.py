"""Compile Triton kernels for any GPU target without a GPU, and read what came out.

The launchers run as they are, on CPU tensors, with every kernel replaced by a recorder; so the arguments, their
specialisation and the chosen configuration are those of a real launch.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from flash_attn_plus.device import Device, family_of

# Bytes of shared memory one program may use (vendors' documentation).
SHARED_MEMORY = {
    "cuda:80": 163 * 1024, "cuda:86": 99 * 1024, "cuda:89": 99 * 1024, "cuda:90": 227 * 1024, "cuda:100": 227 * 1024,
    "cuda:120": 99 * 1024, "hip:gfx90a": 64 * 1024, "hip:gfx942": 64 * 1024, "hip:gfx950": 160 * 1024,
    "hip:gfx1100": 64 * 1024, "hip:gfx1201": 64 * 1024,
}  # fmt: skip
TARGETS = tuple(SHARED_MEMORY)


class Launch(NamedTuple):
    """One recorded kernel launch."""

    kernel: JITFunction
    args: tuple
    options: dict


class Report(NamedTuple):
    """What the compiler made of a launch."""

    shared: int  # bytes
    spills: int  # registers a thread
    assembly: str  # SASS or amdgcn


def parse_target(target: str) -> GPUTarget:
    """'cuda:90' or 'hip:gfx942' as Triton's target."""
    kind, arch = target.split(":")
    if kind == "cuda":
        return GPUTarget("cuda", int(arch), 32)
    return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)


def device_of(target: str) -> Device:
    """The facts the tile tables would see on a device of that target."""
    kind, arch = target.split(":")
    return Device(family_of(kind, arch), SHARED_MEMORY[target], 100)


class _Recorder:
    def __init__(self, kernel: JITFunction, launches: list[Launch]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: object):
        return lambda *args, **options: self.launches.append(Launch(self.kernel, args, options))


@contextmanager
def recorded(module: object, names: tuple[str, ...], target: str) -> Iterator[list[Launch]]:
    """Record launches of the named kernels of a module as if the tensors' device were the target."""
    launches: list[Launch] = []
    patches = [mock.patch.object(module, n, _Recorder(getattr(module, n), launches)) for n in names]
    patches.append(mock.patch("flash_attn_plus.device.probe", return_value=device_of(target)))
    for patch in patches:
        patch.start()
    try:
        yield launches
    finally:
        for patch in patches:
            patch.stop()


def compile_launch(launch: Launch, target: str) -> triton.compiler.CompiledKernel:
    """Compile through Triton's own argument binder, so the specialisation is that of a real launch."""
    where = parse_target(target)
    backend = make_backend(where)
    kernel, options = launch.kernel, {"debug": False, **launch.options}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, parsed = binder(*launch.args, **options)
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, parsed)
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=where, options=parsed.__dict__)


def _tool(name: str, flag: str, cubin: bytes) -> str:
    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        return subprocess.run([str(binary), flag, f.name], check=True, capture_output=True, text=True).stdout


def stray_products(assembly: str) -> list[str]:
    """Hopper's products whose operand does not lie where the address of shared memory led: an assembler lost it.

    Registers count as an address when anything that they were made of did; local memory is trusted.
    """
    addresses: set[str] = set()
    stray = []
    for line in assembly.splitlines():
        line = re.sub(r"/\*.*?\*/", "", line).strip().rstrip("; ")
        line = re.sub(r"^@!?U?P[T\d]+\s+", "", line)
        name, _, rest = line.partition(" ")
        operands = [x.strip() for x in rest.split(",")]
        if name.startswith("HGMMA"):
            at, is_a_there = int(re.findall(r"gdesc\[UR(\d+)\]", rest)[0]), operands[1].startswith("gdesc")
            if not {f"UR{at + 2}", *([f"UR{at}"] if is_a_there else [])} <= addresses:
                stray.append(line)
        elif target := re.fullmatch(r"(U?R)(\d+)", operands[0]):
            sources = set(re.findall(r"\bU?R\d+\b", " ".join(operands[1:])))
            is_base = "SR_CgaCtaId" in rest or name.startswith("LDL") or (rest.endswith(" 0x400") and "MOV" in name)
            width = 4 if ".128" in name else 2 if ".64" in name or "WIDE" in name else 1
            written = {f"{target[1]}{int(target[2]) + i}" for i in range(width)}
            addresses = addresses | written if is_base or sources & addresses else addresses - written
    return stray


def report(compiled: triton.compiler.CompiledKernel) -> Report:
    """Shared memory, spills and assembly of a compiled kernel."""
    if compiled.metadata.target.backend == "cuda":
        cubin = compiled.asm["cubin"]
        usage = dict(re.findall(r"\b(STACK|LOCAL):(\d+)", _tool("cuobjdump", "-res-usage", cubin)))
        spills = (int(usage.get("STACK", 0)) + int(usage.get("LOCAL", 0))) // 4
        return Report(compiled.metadata.shared, spills, _tool("nvdisasm", "-c", cubin))
    assembly = compiled.asm["amdgcn"]
    found = re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)
    return Report(compiled.metadata.shared, int(found.group(1)) if found else 0, assembly)
