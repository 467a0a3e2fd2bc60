"""transformers finds the drop-in by its own check, which no test has touched, in a process that seems to have a GPU."""

import subprocess
import sys

from language_models import MAJOR

PROGRAM = """
import torch
torch.cuda.is_available = lambda: True
torch.version.cuda = torch.version.cuda or "12.8"
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import is_flash_attn_2_available, is_flash_attn_greater_or_equal
assert is_flash_attn_2_available()
assert is_flash_attn_greater_or_equal("2.6.3")
assert not is_flash_attn_greater_or_equal("2.8.4")
sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=97)
model = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="flash_attention_2", torch_dtype=torch.bfloat16))
from transformers import modeling_flash_attention_utils as utils
import flash_attn
functions = utils.lazy_import_flash_attention("flash_attention_2")[0]
assert flash_attn.flash_attn_varlen_func in functions, functions
print(model.config._attn_implementation)
"""


def test_available_and_used():
    program = PROGRAM
    if MAJOR < 5:  # which remembers the functions one by one
        program = PROGRAM.replace(
            'utils.lazy_import_flash_attention("flash_attention_2")[0]', "(utils._flash_varlen_fn,)"
        )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["flash_attention_2"]
