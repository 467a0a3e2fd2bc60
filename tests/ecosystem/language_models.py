"""Tiny random models of transformers: with our attention, with its eager one, and eager in float64."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from programs import default_dtype, operator_calls, require
from torch import Tensor, nn

from flash_attn_plus.testing import assert_close

transformers = require("transformers")
MAJOR = int(transformers.__version__.split(".")[0])
VOCABULARY = 97
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 96,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
}
GPT2 = {
    "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 96, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
GEMMA2 = SIZES | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 5, "attn_logit_softcapping": 2.0}
GEMMA2 |= {"tie_word_embeddings": False}  # tied ones would repeat the last token for ever
# name: (family, options of its config, what makes it special, as options that take it away)
DECODERS = {
    "llama": ("Llama", SIZES, {"num_key_value_heads": 4}),
    "mistral": ("Mistral", SIZES | {"sliding_window": 5}, {"sliding_window": None}),
    "gemma2": ("Gemma2", GEMMA2, {"attn_logit_softcapping": None}),
    "qwen2": ("Qwen2", SIZES | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, {}),
    "gpt2": ("GPT2", GPT2, {}),
}
# In float32 transformers looks for a linear layer beside the attention, and fails for GPT-2, which has none.
FLOAT32_DECODERS = [name for name in DECODERS if name != "gpt2"]


def admit_cpu() -> None:
    """Let transformers use an installed flash_attn without a GPU, by the answer that it would give beside one."""
    if torch.cuda.is_available():
        return
    import_utils = transformers.utils.import_utils
    if MAJOR < 5:
        transformers.utils.is_flash_attn_2_available = import_utils.is_flash_attn_2_available = lambda: True
        return
    asked = import_utils.is_torch_cuda_available
    import_utils.is_torch_cuda_available = lambda: True
    try:  # the answers are remembered by the arguments
        assert import_utils.is_flash_attn_2_available()
        assert all(import_utils.is_flash_attn_2_available(kernels_fallback_ok=ok) for ok in (False, True))
    finally:
        import_utils.is_torch_cuda_available = asked


def randomize(model: nn.Module) -> nn.Module:
    """The model with nothing at zero or one, where initialisation would hide a mistake."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model


class Trio(NamedTuple):
    """The same weights three times; no config is shared, so none can turn another one's attention."""

    flash: nn.Module
    eager: nn.Module
    reference: nn.Module

    def hold(self, name: str, compute: Callable[[nn.Module], Tensor], layers: int, kind: str = "") -> None:
        """compute(model) of flash to the tolerance rule; our forward must run once per layer, and never in eager.

        `kind` is " packed" where sequences must arrive without padding, "mixed" where as many layers are packed as not.
        """
        with operator_calls() as calls:
            eager = compute(self.eager)
            with default_dtype(torch.float64):
                reference = compute(self.reference).double()
        assert not calls, calls
        with operator_calls() as calls:
            actual = compute(self.flash)
        kinds = ("", " packed") if kind == "mixed" else (kind,)
        assert {key: n for key, n in calls.items() if "forward" in key} == {"forward" + k: layers for k in kinds}, calls
        assert not {key for key in calls if "backward" in key} - {"backward" + k for k in kinds}, calls
        assert_close(name, actual, reference, eager)


def build(model_class: str, config: Callable, dtype, device: str) -> Trio:
    """config(implementation) makes a config of its own."""
    torch.manual_seed(0)
    eager = randomize(getattr(transformers, model_class)(config("eager"))).eval()
    flash = getattr(transformers, model_class)(config("flash_attention_2")).eval()
    flash.load_state_dict(eager.state_dict())
    assert flash.config._attn_implementation == "flash_attention_2"
    assert eager.config._attn_implementation == "eager"
    flash, eager = flash.to(device, dtype), eager.to(device, dtype)
    return Trio(flash, eager, copy.deepcopy(eager).double())


def decoder(name: str, dtype=torch.float32, device: str = "cpu", **options) -> Trio:
    """A decoder of DECODERS; the options change its config."""
    family, fields, _ = DECODERS[name]
    config_class = getattr(transformers, family + "Config")
    model_class = "GPT2LMHeadModel" if family == "GPT2" else family + "ForCausalLM"
    return build(
        model_class, lambda attention: config_class(**fields | options, attn_implementation=attention), dtype, device
    )
