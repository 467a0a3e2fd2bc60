"""The source tree as the architecture tests see it."""

import ast
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ROOT / "src" / "flash_attn_plus"
MODULES = ROOT / "src" / "flash_attention"
DROPIN = ROOT / "dropin" / "src"
_GENERATED = {"build", "dist", "demo-results", "__pycache__"}


def python_files(*folders: Path) -> list[Path]:
    """Every .py file below the folders, without what tools generate."""
    found = []
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(ROOT).parts
            if not any(p in _GENERATED or p.startswith(".") or p.endswith(".egg-info") for p in parts):
                found.append(path)
    return found


@cache
def parse(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_modules(path: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, inside functions too; `from a import b` gives a and a.b."""
    return _imports(ast.walk(parse(path)))


def imported_at_load(path: Path) -> Iterator[str]:
    """The same of the statements that run when the file is imported, at the top level."""
    return _imports(iter(parse(path).body))


def _imports(nodes: Iterator[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module  # relative imports are refused by the linter
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def shown(path: Path) -> str:
    """The path as a reader of a failure wants it."""
    return str(path.relative_to(ROOT))


def source_environment() -> dict[str, str]:
    """The environment for a fresh process that imports both packages from this tree, without any GPU."""
    paths = [str(ENGINE.parent), str(DROPIN), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
