"""The README stays short, its examples run, and its numbers are those of the results files."""

import json
import re
import subprocess
import sys

import pytest
from source_tree import ROOT, source_environment

README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
GENERATOR = ROOT / "tools" / "readme_tables.py"


def generator() -> dict:
    """The names that the generator defines, with the folder it reads replaced by nothing."""
    names: dict = {"__name__": "readme_tables", "__file__": str(GENERATOR)}
    exec(compile(GENERATOR.read_text(encoding="utf-8"), str(GENERATOR), "exec"), names)
    return names


def test_it_is_short():
    assert README.count("\n") < 150


def test_it_has_an_example():
    assert EXAMPLES


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda _: "")
def test_its_examples_run(code):
    done = subprocess.run(
        [sys.executable, "-c", code], env=source_environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_its_numbers_come_from_the_results_files():
    done = subprocess.run([sys.executable, GENERATOR, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_table_has_a_line_a_case_and_a_column_a_provider(tmp_path):
    row = {"suite": "forward", "metric": "speed", "unit": "TFLOP/s"}
    results = {
        "readme": [["forward", "speed"]],
        "device": "some GPU",
        "versions": {"torch": "2.13.0"},
        "rows": [
            {**row, "case": "4k", "provider": "ours", "value": 612.3},
            {**row, "case": "4k", "provider": "sdpa", "value": 0.5},
            {**row, "case": "8k", "provider": "ours", "value": None},
        ],
    }
    (tmp_path / "gpu.json").write_text(json.dumps(results), encoding="utf-8")
    (tmp_path / "other.json").write_text('{"rows": [{"name": "data that is not for the README"}]}', encoding="utf-8")
    names = generator()
    assert names["section"](tmp_path).splitlines()[2:] == [
        "Measured on some GPU (torch 2.13.0), `benchmarks/results/gpu.json`:",
        "",
        "| forward, speed (TFLOP/s) | ours | sdpa |",
        "| --- | --: | --: |",
        "| 4k | 612 | 0.5 |",
        "| 8k | - | - |",
    ]


def test_without_results_the_section_is_empty_and_old_numbers_go(tmp_path):
    names = generator()
    old = f"a\n{names['BEGIN']}\n## Numbers\n| 1 |\n{names['END']}\nb\n"
    assert names["filled"](old, tmp_path) == f"a\n{names['BEGIN']}\n{names['END']}\nb\n"
