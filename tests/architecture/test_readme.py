"""The README stays short, its example runs in a fresh process, and what is generated in it is up to date."""

import re
import subprocess
import sys

import pytest
from source_tree import ROOT, source_environment

README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_it_is_short():
    assert README.count("\n") < 150


def test_it_has_one_short_example():
    assert len(EXAMPLES) == 1
    assert EXAMPLES[0].count("\n") <= 12


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda _: "")
def test_its_example_runs(code):
    done = subprocess.run(
        [sys.executable, "-c", code], env=source_environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_its_matrix_and_its_numbers_are_those_of_their_files():
    command = [sys.executable, "-m", "tools.readme_tables", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
