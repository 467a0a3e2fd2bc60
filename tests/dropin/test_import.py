"""Imports in fresh processes: no Triton, no GPU, nothing heavy, and room for flash_attn.cute beside us."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

GOLDEN = json.loads((Path(__file__).parent / "interface_golden.json").read_text())
SUBMODULES = ("flash_attn_2_cuda", "flash_attn", *(f"flash_attn.{name}" for name in GOLDEN["modules"]))


def run(code: str, *paths: str, hides_gpu: bool = True) -> str:
    """stdout of the code in a process that, unless told otherwise, sees no GPU."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, *(p for p in sys.path if p)])}
    if hides_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_and_attention_without_triton_or_gpu():
    printed = run(
        f"""
        import importlib, importlib.abc, sys

        class NoTriton(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "triton":
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

        sys.meta_path.insert(0, NoTriton())
        for name in {SUBMODULES!r}:
            importlib.import_module(name)
        import torch
        assert not torch.cuda.is_initialized()
        from flash_attn import flash_attn_func
        x = torch.randn(1, 8, 2, 16, requires_grad=True)
        flash_attn_func(x, x, x, causal=True).sum().backward()
        print(x.grad.isfinite().all().item())
        """
    )
    assert printed.strip() == "True"


def test_no_module_starts_a_gpu_context():
    """Workers that are forked later inherit what was imported, and a context would break them."""
    code = f"""
        import importlib
        for name in {SUBMODULES!r}:
            importlib.import_module(name)
        import torch
        print(torch.cuda.is_initialized())
        """
    assert run(code, hides_gpu=False).strip() == "False"


def test_import_is_light():
    printed = run(
        """
        import sys, torch
        before = set(sys.modules)
        import flash_attn
        new = {name.split(".")[0] for name in set(sys.modules) - before}
        print(sorted(new & {"triton", "transformers", "diffusers", "torchvision", "timm", "safetensors"}))
        """
    )
    assert printed.strip() == "[]"


def test_cute_of_another_distribution_resolves(tmp_path):
    cute = tmp_path / "flash_attn" / "cute"
    cute.mkdir(parents=True)
    (cute / "__init__.py").write_text("name = 'the other distribution'\n")
    for order in (0, 1):
        paths = [str(tmp_path)] if order == 0 else []
        printed = run(
            f"""
            import sys
            if {order}:
                sys.path.append({str(tmp_path)!r})
            import flash_attn, flash_attn.cute
            print(flash_attn.__version__, flash_attn.cute.name)
            """,
            *paths,
        )
        assert printed.strip() == "2.8.3 the other distribution"


def test_cute_is_absent_without_it():
    assert run("import importlib.util as u; print(u.find_spec('flash_attn.cute'))").strip() == "None"
