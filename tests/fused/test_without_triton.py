"""On a machine without Triton everything imports and runs."""

import os
import subprocess
import sys

CODE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("blocked: " + name, name=name)
sys.meta_path.insert(0, Blocked())
import torch
from flash_attn.layers.patch_embed import PatchEmbed
from flash_attn.layers.rotary import RotaryEmbedding
from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.ops.activations import swiglu
from flash_attn.ops.fused_dense import FusedMLP
from flash_attn.ops.rms_norm import rms_norm
from flash_attn.ops.triton import cross_entropy, k_activations, linear, mlp, rotary
from flash_attn.ops.triton.layer_norm import layer_norm_fn
assert rotary.rotary_kernel is None and k_activations.gelu is None and cross_entropy.cross_entropy_fwd_kernel is None
x = torch.randn(4, 16, requires_grad=True)
w = torch.ones(16, requires_grad=True)
y = layer_norm_fn(rms_norm(x, w, 1e-6), w, w, dropout_p=0.5)
loss = CrossEntropyLoss()(FusedMLP(16)(swiglu(y, x)), torch.tensor([1, 2, 3, -100]))
loss.backward()
assert x.grad.isfinite().all() and x.grad.any()
assert RotaryEmbedding(8)(torch.randn(1, 3, 3, 2, 8)).shape == (1, 3, 3, 2, 8)
assert PatchEmbed(8, 4)(torch.randn(1, 3, 8, 8)).shape == (1, 4, 768)
assert "triton" not in sys.modules
"""


def test_everything_runs():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
