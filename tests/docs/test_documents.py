"""What the documents say of the tree is so: tests, targets, variables, messages; and both READMEs say the same."""

import importlib.util
import os
import re
import subprocess
import sys

import documents
import pytest

from flash_attn_plus import env
from flash_attn_plus.backends import triton_portable

NUMBER = re.compile(r"(?<![\w.-])\d[\d,.]*\d|(?<![\w.-])\d(?![\w.])")


def headings(path) -> list[str]:
    """The level of every heading."""
    return re.findall(r"^(#+) ", documents.prose(path), re.MULTILINE)


def tables(path) -> list[list[str]]:
    """What code and numbers every table holds, line by line."""
    found = re.findall(r"(?:^\|.*\|\n)+", documents.prose(path), re.MULTILINE)
    return [[str(re.findall(r"`[^`]*`", line) + NUMBER.findall(line)) for line in t.splitlines()] for t in found]


def test_the_chinese_readme_has_the_english_ones_parts():
    english, chinese = documents.README, documents.CHINESE
    assert headings(english) == headings(chinese)
    assert documents.blocks(english) == documents.blocks(chinese)
    assert tables(english) == tables(chinese)


def test_the_chinese_readme_has_the_english_ones_numbers_names_and_links():
    def told(path, pattern: str) -> list[str]:
        return sorted(re.findall(pattern, documents.prose(path)))

    for pattern in (r"`[^`]+`", r"https?://[^)\s]+", r"FLASH_\w+", r"(?<![\w.-])\d+(?:[.,]\d+)*(?![\w.])"):
        assert told(documents.README, pattern) == told(documents.CHINESE, pattern), pattern


def test_every_tick_of_the_migration_guide_names_a_test():
    lines = [line for line in documents.prose(documents.GUIDE).splitlines() if "✓" in line]
    assert len(lines) > 20
    for line in lines:
        path, name = re.search(r"`(tests/[\w/]+\.py)::(\w+)`", line).groups()
        assert f"def {name}(" in (documents.ROOT / path).read_text(encoding="utf-8"), line
    assert not re.search("[✗✘❌]", documents.GUIDE.read_text(encoding="utf-8"))


def test_hardware_names_every_target_that_is_compiled():
    harness = (documents.ROOT / "tests" / "compile" / "harness.py").read_text(encoding="utf-8")
    compiled = set(re.findall(r'"((?:cuda|hip):\w+)":', harness))
    assert compiled
    page = (documents.ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `((?:cuda|hip):\w+)` \|", page, re.MULTILINE)) == compiled


def test_every_variable_of_the_engine_is_told():
    page = (documents.ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    variables = {value for value in vars(env).values() if isinstance(value, str) and value.startswith("FLASH_")}
    assert variables == set(re.findall(r"^\| `(FLASH_\w+)` \|", page, re.MULTILINE))
    assert variables >= set(re.findall(r"FLASH_\w+", documents.README.read_text(encoding="utf-8")))


def test_every_example_is_told():
    page = (documents.ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    for path in (documents.ROOT / "examples").glob("*.py"):
        assert path.stem in page, path.name


def test_messages_of_troubleshooting_are_those_that_users_see(monkeypatch):
    page = (documents.ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert triton_portable.TritonPortable().unavailable() in page
    monkeypatch.undo()
    build = pytest.importorskip("triton.runtime.build")
    errors = pytest.importorskip("triton.runtime.errors")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError) as no_compiler:
        build._build("launcher", "launcher.c", ".", [], [], [], [])
    assert str(no_compiler.value) in page
    assert str(errors.OutOfResources(1, 0, "shared memory")).split(" Required")[0] in page


def test_the_site_builds_without_a_warning(tmp_path):
    for name in ("mkdocs", "material", "mkdocstrings_handlers", "matplotlib"):
        pytest.importorskip(name)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=documents.ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    page = (tmp_path / "performance.html").read_text(encoding="utf-8")
    assert "attention-dark.svg" in page
    assert (tmp_path / "assets" / "attention-dark.svg").exists()
    assert "cu_seqlens_q" in (tmp_path / "api" / "flash_attn_plus.html").read_text(encoding="utf-8")
