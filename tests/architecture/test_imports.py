"""Both packages import in a fresh process on a bare machine: no Triton, no GPU, no optional package touched."""

import subprocess
import sys

import pytest
from source_tree import source_environment

OPTIONAL = ("triton", "numpy", "flag_gems", "transformers", "matplotlib")
BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("blocked: " + name, name=name)
sys.meta_path.insert(0, Blocked())
"""
CALL = """
import torch
q, k, v = (torch.randn(1, 5, 2, 8, requires_grad=True) for _ in range(3))
scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 8 ** -0.5
weights = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
expected = torch.einsum("bhqk,bkhd->bqhd", weights, v)
torch.testing.assert_close(out, expected)
torch.testing.assert_close(torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(expected.sum(), (q, k, v)))
"""
BHSD = "flash_attention.flash_attention(*(x.transpose(1, 2) for x in (q, k, v)), causal=True).transpose(1, 2)"
CALLS = {
    "flash_attention": "import flash_attention\n" + CALL.replace("scores", f"out = {BHSD}\nscores", 1),
    "flash_attn_plus": "import flash_attn_plus\n"
    + CALL.replace("scores", "out = flash_attn_plus.attention(q, k, v, causal=True)\nscores", 1),
    "flash_attn": "import flash_attn\n"
    + CALL.replace("scores", "out = flash_attn.flash_attn_func(q, k, v, causal=True)\nscores", 1),
}


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=source_environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("package", CALLS)
def test_attention_runs_without_triton_and_without_a_gpu(package):
    run(BLOCK.format(blocked=("triton", "flag_gems")) + CALLS[package])


@pytest.mark.parametrize("package", CALLS)
def test_importing_touches_no_optional_package(package):
    code = f"import torch, sys; before = set(sys.modules); import {package}; print(*(set(sys.modules) - before))"
    loaded = {name.split(".")[0] for name in run(code).split()}
    assert package in loaded
    assert not loaded & set(OPTIONAL)


def test_importing_leaves_the_gpu_alone():
    code = "import flash_attn, flash_attn_plus, torch; print(torch.cuda.is_initialized())"
    assert run(code) == "False"
