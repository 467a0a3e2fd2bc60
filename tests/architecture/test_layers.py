"""Imports point downward only; DESIGN.md draws the layers."""

from collections.abc import Iterable
from pathlib import Path

from source_tree import DROPIN, ENGINE, MODULES, imported_at_load, imported_modules, python_files, shown

# Lowest first. A module may import its own layer and lower ones; `selection` names backends as strings only.
LAYERS = (
    {"arguments", "derivatives", "env", "errors", "kernels"},
    {"device", "dispatch", "dropout", "problem"},
    {"cache_checks", "checks"},
    {"tuning"},
    {"backends"},
    {"selection"},
    {"ops", "fused"},
    {"autograd", "cache_append"},
    {"block_sparse", "functional", "kvcache"},
    {"__init__"},
    {"reference", "testing"},
    {"cli"},
    {"__main__"},
)
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}
FACE = "__init__"
KERNEL_LIBRARIES = {"flash_attn_plus.kernels", "triton", "typing", "collections", "sys", "types"}
MAY_IMPORT_TRITON = ("kernels/", "backends/triton_", "backends/gluon_")
ENGINE_FILES = python_files(ENGINE)
FUSED_FACE = "flash_attn_plus.fused.rotary"  # what flash_attention may know of the engine beside its names


def inside(path: Path) -> str:
    return path.relative_to(ENGINE).as_posix()


def part_of(path: Path) -> str:
    return inside(path).split("/")[0].removesuffix(".py")


def part_named(module: str) -> str:
    """`flash_attn_plus.backends.base` -> `backends`; the package, or a name it exports, -> `__init__`."""
    name = module.split(".")[1] if "." in module else FACE
    exists = (ENGINE / name).is_dir() or (ENGINE / f"{name}.py").is_file()
    return name if exists else FACE


def engine_parts_imported(path: Path) -> set[str]:
    modules = {m for m in imported_modules(path) if m.split(".")[0] == "flash_attn_plus"}
    # `from flash_attn_plus import ops` yields the package and the module; only the second is what is meant.
    return {part_named(m) for m in modules if m != "flash_attn_plus" or modules == {m}}


def roots(modules: Iterable[str]) -> set[str]:
    return {module.split(".")[0] for module in modules}


def test_every_part_has_a_layer():
    assert not {part_of(path) for path in ENGINE_FILES} - LEVEL.keys(), "give it a place in LAYERS and in DESIGN.md"


def test_a_module_imports_its_own_layer_and_lower_ones():
    upward = [
        f"{shown(path)} imports {part}"
        for path in ENGINE_FILES
        for part in engine_parts_imported(path)
        if LEVEL[part] > LEVEL[part_of(path)]
    ]
    assert not upward


def test_the_engine_does_not_know_the_dropin():
    upward = [shown(p) for p in ENGINE_FILES if roots(imported_modules(p)) & {"flash_attn", "flash_attn_2_cuda"}]
    assert not upward


def test_the_modules_know_the_engine_by_its_faces_only():
    strangers = [
        f"{shown(path)} imports {module}"
        for path in python_files(MODULES)
        for module in imported_modules(path)
        if module.split(".")[0] in {"flash_attn", "flash_attn_2_cuda"}
        or (module.split(".")[0] == "flash_attn_plus" and part_named(module) != FACE and FUSED_FACE not in module)
    ]
    assert not strangers


def test_the_engine_does_not_know_the_modules():
    upward = [shown(p) for p in ENGINE_FILES if "flash_attention" in roots(imported_modules(p))]
    assert not upward


def test_kernels_import_only_kernels_and_triton():
    strangers = [
        f"{shown(path)} imports {module}; torch and every decision belong into a backend"
        for path in python_files(ENGINE / "kernels")
        for module in imported_modules(path)
        if not any(module == name or module.startswith(name + ".") for name in KERNEL_LIBRARIES)
    ]
    assert not strangers


def test_triton_is_imported_at_load_by_kernels_and_their_launchers_only():
    eager = [
        shown(path)
        for path in ENGINE_FILES
        if not inside(path).startswith(MAY_IMPORT_TRITON) and "triton" in roots(imported_at_load(path))
    ]
    assert not eager, "import triton where it is used, so that the package imports without it"


def test_the_dropin_holds_no_kernel():
    launching = [
        f"{shown(path)} imports {module}; go through the engine"
        for path in python_files(DROPIN)
        for module in imported_modules(path)
        if module.split(".")[0] == "triton" or module.startswith("flash_attn_plus.kernels")
    ]
    assert not launching
