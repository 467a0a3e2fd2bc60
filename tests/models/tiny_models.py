"""Tiny random models of every structure, with stand-ins for transformers' configs so that it is not needed."""

import copy

import torch
from flash_attn.models.gpt import GPTLMHeadModel

from flash_attn_plus.testing import assert_close


class GPT2Config:
    """The attributes of transformers' class of this name that the models read."""

    max_position_embeddings = property(lambda self: self.n_positions)
    hidden_size = property(lambda self: self.n_embd)
    num_hidden_layers = property(lambda self: self.n_layer)
    num_attention_heads = property(lambda self: self.n_head)

    def __init__(self, **fields):
        self.vocab_size, self.n_positions, self.n_embd, self.n_layer, self.n_head = 61, 40, 64, 2, 4
        self.n_inner, self.activation_function = None, "gelu_new"
        self.resid_pdrop = self.embd_pdrop = self.attn_pdrop = 0.0
        self.layer_norm_epsilon, self.initializer_range = 1e-5, 0.02
        self.scale_attn_weights, self.scale_attn_by_inverse_layer_idx = True, False
        for name, value in fields.items():
            setattr(self, name, value)


class BertConfig:
    """The attributes of transformers' class of this name that the models read."""

    def __init__(self, **fields):
        self.vocab_size, self.hidden_size, self.num_hidden_layers, self.num_attention_heads = 61, 32, 2, 2
        self.intermediate_size, self.hidden_act, self.max_position_embeddings, self.type_vocab_size = 48, "gelu", 24, 2
        self.hidden_dropout_prob = self.attention_probs_dropout_prob = 0.0
        self.layer_norm_eps, self.initializer_range, self.pad_token_id = 1e-12, 0.02, 0
        for name, value in fields.items():
            setattr(self, name, value)


ROTARY = {"n_positions": 0, "rotary_emb_fraction": 1.0}
# name: fields of the config, one for each way in which families differ
STRUCTURES = {
    "positions": {},
    "rotary": ROTARY,
    "rotary-16-of-32": ROTARY | {"rotary_emb_fraction": 0.5, "n_head": 2},
    "rotary-interleaved-grouped-gated": ROTARY
    | {
        "rotary_emb_interleaved": True,
        "n_head_kv": 2,
        "rms_norm": True,
        "activation_function": "swiglu",
        "mlp_multiple_of": 8,
    },
    "xpos": ROTARY | {"rotary_emb_scale_base": 512},
    "multi-query-parallel": ROTARY | {"n_head_kv": 1, "parallel_block": True, "parallel_block_tied_norm": True},
    "parallel-two-norms": {"parallel_block": True, "residual_in_fp32": True},
    "postnorm-projected": {"prenorm": False, "word_embed_proj_dim": 32, "activation_function": "relu"},
    "mup": {
        "mup_width_scale": 0.5,
        "mup_embeddings_multiplier": 3.0,
        "mup_output_multiplier": 2.0,
        "mup_scale_qk_dot_by_d": True,
        "norm_head": True,
        "tie_word_embeddings": False,
    },
}
# Attention that only the engine has.
FLASH_ONLY = {
    "alibi": {"n_positions": 0, "use_alibi": True, "n_head": 8},
    "window": ROTARY | {"window_size": (5, 0)},
}


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """The model in evaluation mode with nothing at zero or one, where initialisation would hide a mistake."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model.eval()


def make_gpt(fields: dict, **options) -> GPTLMHeadModel:
    """A seeded model with these fields in its config."""
    torch.manual_seed(0)
    return randomize(GPTLMHeadModel(GPT2Config(**fields | options)))


def flat_gradients(model: torch.nn.Module, loss) -> torch.Tensor:
    """Every gradient of loss(model) in one vector."""
    model.zero_grad()
    with torch.enable_grad():
        loss(model).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def make_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    """Seeded tokens of the tiny vocabulary, without 0."""
    return torch.randint(1, 61, shape, generator=torch.Generator().manual_seed(seed))


def assert_same(name: str, actual: torch.Tensor, model: torch.nn.Module, compute) -> None:
    """A float32 result against compute(model) in float64, by the tolerance rule."""
    with torch.no_grad():
        assert_close(name, actual, compute(copy.deepcopy(model).double()).double(), compute(model))
