"""What every Python file of the repository keeps to: size, and a few things that are never done."""

import ast
import re
from pathlib import Path

from source_tree import DROPIN, ENGINE, MODULES, ROOT, parse, python_files, shown

FILE_LINES = 500
HOST_LINES = 60
KERNEL_LINES = 120
LIBRARY = python_files(ENGINE, MODULES, DROPIN)
EVERYTHING = python_files(
    *(ROOT / name for name in ("src", "dropin", "demo", "benchmarks", "examples", "tests", "tools"))
)
TEXTS = [p for p in ROOT.iterdir() if p.suffix in {".md", ".toml", ".txt"} or p.name in {"Makefile", "LICENSE"}]
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|home|root|Users|mnt)/\w")
UNFINISHED = re.compile(r"\b(?:TO(?:DO)|FIX(?:ME)|XX(?:X)|HA(?:CK))\b|^\s*#\s*@\w")


def functions(path: Path) -> list[ast.FunctionDef]:
    return [n for n in ast.walk(parse(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def is_kernel(function: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def normal_limit(function: ast.FunctionDef) -> int:
    return KERNEL_LINES if is_kernel(function) else HOST_LINES


def code_lines(function: ast.FunctionDef) -> int:
    """Lines from `def` to the end, without the docstring."""
    first = function.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str)
    docstring = first.end_lineno - first.lineno + 1 if is_docstring else 0
    return function.end_lineno - function.lineno + 1 - docstring


def edits_import_path(node: ast.AST) -> bool:
    """Whether a node is `sys.path.append(...)` or the like, or assigns to sys.path or a part of it."""
    if isinstance(node, ast.Call):
        return ast.unparse(node.func).startswith("sys.path.")
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return any(t is not None and ast.unparse(t).startswith("sys.path") for t in targets)


def matching_lines(pattern: re.Pattern, paths: list[Path]) -> list[str]:
    return [
        f"{shown(path)}:{number} {line.strip()}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]


def test_no_file_has_become_two_things():
    lengths = {shown(path): path.read_text(encoding="utf-8").count("\n") for path in EVERYTHING}
    assert not {name: lines for name, lines in lengths.items() if lines > FILE_LINES}


def test_functions_fit_on_a_screen_or_two():
    too_long = []
    for path in LIBRARY:
        for function in functions(path):
            limit = normal_limit(function)
            if code_lines(function) > limit:
                too_long.append(f"{shown(path)}:{function.lineno} {function.name}: {code_lines(function)} > {limit}")
    assert not too_long


def test_no_exception_is_swallowed_unseen():
    broad = [
        f"{shown(path)}:{node.lineno}"
        for path in EVERYTHING
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in {"Exception", "BaseException"})
    ]
    assert not broad, "name the exceptions that are meant"


def test_no_import_path_is_edited():
    edits = [
        f"{shown(path)}:{node.lineno}"
        for path in EVERYTHING
        for node in ast.walk(parse(path))
        if edits_import_path(node)
    ]
    assert not edits, "install the package or set PYTHONPATH"


def test_no_path_of_one_machine():
    assert not matching_lines(MACHINE_PATH, [*EVERYTHING, *TEXTS])


def test_no_notes_to_oneself_and_no_disabled_decorators():
    assert not matching_lines(UNFINISHED, EVERYTHING)


def test_no_two_tests_share_a_name():
    """pytest imports test files by their names alone, so that two of one name cannot run together."""
    names = [p.name for p in python_files(ROOT / "tests") if p.name.startswith("test_")]
    assert sorted(names) == sorted(set(names))
