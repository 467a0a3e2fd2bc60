"""The way to use our attention in transformers on a CPU without changing anything: a local folder of kernels."""

import json
import os
import subprocess
import sys

from programs import require

require("kernels")
REPOSITORY = "kernels-community/flash-attn2"
PROGRAM = """
import json, torch
from programs import operator_calls
from transformers import LlamaConfig, LlamaForCausalLM

def build(attention):
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=97)
    config = LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=64, attn_implementation=attention)
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()

ids = torch.randint(2, 97, (2, 13), generator=torch.Generator().manual_seed(1))
mask = torch.ones_like(ids)
mask[0, :5] = 0
options = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=97)
flash, eager = build("{attention}"), build("eager")
with operator_calls() as eager_calls:
    expected = eager.generate(ids, **options)
with operator_calls() as calls:
    generated = flash.generate(ids, **options)
print(json.dumps([flash.config._attn_implementation, calls.total(), eager_calls.total(),
                  torch.equal(generated, expected)]))
"""


def test_llama_without_a_change(tmp_path):
    folder = tmp_path / "build" / "torch-cpu"
    folder.mkdir(parents=True)
    names = "flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache"
    (folder / "__init__.py").write_text(f"from flash_attn import {names}\n")
    metadata = {
        "name": "flash-attn2",
        "id": "flash-attn2",
        "version": 1,
        "license": "BSD-3-Clause",
        "backend": {"type": "cpu"},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata | {"python-depends": []}))
    environment = os.environ | {"LOCAL_KERNELS": f"{REPOSITORY}={tmp_path}", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("{attention}", REPOSITORY)],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    attention, calls, eager_calls, is_equal = json.loads(done.stdout.splitlines()[-1])
    assert attention == REPOSITORY
    assert calls >= 8 * 2
    assert eager_calls == 0
    assert is_equal
