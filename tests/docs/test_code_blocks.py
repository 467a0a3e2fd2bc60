"""Every block of code in the documents runs, and prints what the page says."""

import contextlib
import io
import os
import re
import shlex
from pathlib import Path

import documents
import pytest
import torch

from flash_attn_plus import env
from flash_attn_plus.cli.main import build_parser
from flash_attn_plus.cli.words import read_call

WITH_PYTHON = [p for p in documents.DOCUMENTS if any(b.language == "python" for b in documents.blocks(p))]
WITH_SHELL = [p for p in documents.DOCUMENTS if any(b.language == "sh" for b in documents.blocks(p))]
TARGETS = set(re.findall(r"^([a-z-]+):", (documents.ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
VARIABLES = {str(getattr(env, name)) for name in dir(env) if name.isupper()} | {"TRITON_CACHE_DIR"}
LANGUAGES = {"python", "sh", "text"}


@pytest.fixture
def unchanged():
    """What the code of a page may set, and the next page must not find."""
    before, precision = dict(os.environ), torch.are_deterministic_algorithms_enabled()
    yield
    os.environ.clear()
    os.environ.update(before)
    torch.use_deterministic_algorithms(precision)


@pytest.mark.parametrize("path", WITH_PYTHON, ids=documents.name_of)
def test_python_runs_and_prints_what_the_page_says(path, unchanged):
    torch.manual_seed(0)
    names: dict = {"__name__": "page"}  # one reader types a page from top to bottom
    found = documents.blocks(path)
    for i, block in enumerate(found):
        if block.language != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block.text, f"{documents.name_of(path)}, block {i}", "exec"), names)
        if i + 1 < len(found) and found[i + 1].is_output:
            assert printed.getvalue().strip() == found[i + 1].text.strip(), block.text


def test_every_block_is_of_a_checked_kind():
    for path in documents.DOCUMENTS:
        found = documents.blocks(path)
        for i, block in enumerate(found):
            assert block.language in LANGUAGES, f"{documents.name_of(path)}: {block.info}"
            assert not block.is_output or found[i - 1].language == "python", documents.name_of(path)


def check_command(words: list[str]) -> None:
    """Fail unless the command is one of a few, with arguments that it takes."""
    while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
        variable = words.pop(0).split("=")[0]
        assert variable in VARIABLES, variable
    program, *arguments = words
    if program == "python" and arguments[0] == "-m":
        program, arguments = arguments[1], arguments[2:]
    if program in ("flash-attn-plus", "flash_attn_plus"):
        parsed = build_parser().parse_args(arguments)
        if getattr(parsed, "explain", None):
            read_call(parsed.explain.replace("grad", "grad device=cpu"))
    elif program == "make":
        assert {word for word in arguments if "=" not in word} <= TARGETS, arguments
    elif program == "python":
        script = documents.ROOT / arguments[0]
        assert script.exists() or arguments == ["train.py"], arguments
    elif program.startswith("examples."):
        assert (documents.ROOT / f"{program.replace('.', '/')}.py").exists(), program
    elif program == "pip":
        check_pip(arguments)
    else:
        assert program in ("git", "cd", "venv"), f"{program} is no command that the documents may show"


def check_pip(arguments: list[str]) -> None:
    """Fail unless what is installed are folders of this tree, their extras, or packages that are known to be needed."""
    assert arguments[0] in ("install", "uninstall")
    for word in (w for w in arguments[1:] if not w.startswith("-")):
        folder = Path(documents.ROOT / word.split("[")[0])
        assert (folder / "pyproject.toml").exists() or word in ("flash-attn", "scikit-learn", "triton"), word
        for extra in re.findall(r"\[(\w+)\]", word):
            assert f"\n{extra} = [" in (folder / "pyproject.toml").read_text(encoding="utf-8"), word


@pytest.mark.parametrize("path", WITH_SHELL, ids=documents.name_of)
def test_shell_names_commands_that_there_are(path):
    for block in documents.blocks(path):
        if block.language == "sh":
            for line in block.text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    check_command(words)


@pytest.mark.parametrize(
    "line",
    ["make nothing", "flash-attn-plus inform", "python gone.py", "curl example.com", "FLASH_ATTENTION_X=1 make test"],
)
def test_a_wrong_command_is_seen(line):
    with pytest.raises((AssertionError, SystemExit)):
        check_command(shlex.split(line))
