"""transformers' encoders, encoder-decoders and vision towers over flash_attention_2 against their eager attention."""

import pytest
import torch
from language_models import MAJOR, VOCABULARY, admit_cpu, build, transformers
from programs import operator_calls

admit_cpu()
LENGTHS = (16, 5, 11)
ENCODER = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "vocab_size": VOCABULARY, "max_position_embeddings": 32, "pad_token_id": 0, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
MODERNBERT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "vocab_size": VOCABULARY, "max_position_embeddings": 32, "pad_token_id": 0, "local_attention": 6,
    "global_attn_every_n_layers": 3, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 1,
    "cls_token_id": 1, "sep_token_id": 1, "reference_compile": False,
}  # fmt: skip
BART = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "dropout": 0.0,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "vocab_size": VOCABULARY,
    "max_position_embeddings": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "attention_dropout": 0.0,
    "decoder_start_token_id": 2, "forced_eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip


def batch(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and their mask."""
    ids = torch.randint(2, VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(16) < torch.tensor(LENGTHS)[:, None]
    return ids.where(mask, 0).to(device), mask.long().to(device)


def values_and_gradients(model, values: torch.Tensor) -> torch.Tensor:
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(2)).to(values)
    model.zero_grad()
    (values * weights).sum().backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return torch.cat((values.detach().flatten() * 20.0, grads))


def rows(ids, mask) -> list[torch.Tensor]:
    return [row[m.bool()][None] for row, m in zip(ids, mask, strict=True)]


@pytest.mark.skipif(MAJOR < 5, reason="BERT has no flash attention in transformers 4")
def test_bert(device):
    trio = build(
        "BertModel", lambda name: transformers.BertConfig(**ENCODER, attn_implementation=name), torch.float32, device
    )
    ids, mask = batch(device)

    def compute(model):
        if model is trio.flash:
            hidden = model(ids, attention_mask=mask).last_hidden_state[mask.bool()]
        else:
            hidden = torch.cat([model(x).last_hidden_state[0] for x in rows(ids, mask)])
        return values_and_gradients(model, hidden)

    trio.hold("hidden", compute, 3, " packed")


def test_modernbert(device):
    """Rotary embedding of strided packed slices in place, windows in two of three layers, packed sequences."""

    def config(name):
        return transformers.ModernBertConfig(**MODERNBERT, attn_implementation=name)

    trio = build("ModernBertForMaskedLM", config, torch.float32, device)
    ids, mask = batch(device)

    def compute(model):
        if model is trio.flash:
            logits = model(ids, attention_mask=mask).logits[mask.bool()]
        else:
            logits = torch.cat([model(x, attention_mask=torch.ones_like(x)).logits[0] for x in rows(ids, mask)])
        return values_and_gradients(model, logits)

    trio.hold("logits", compute, 3, " packed")


@pytest.mark.skipif(MAJOR >= 5, reason="version 5 has a rotary embedding of its own")
def test_modernbert_of_version_4_uses_our_rotary_embedding():
    import flash_attn.layers.rotary
    from transformers.models.modernbert import modeling_modernbert

    module = modeling_modernbert.ModernBertUnpaddedRotaryEmbedding(dim=16, base=10000.0)
    assert isinstance(module, flash_attn.layers.rotary.RotaryEmbedding)


def bart(device):
    def config(name):
        return transformers.BartConfig(**BART, attn_implementation=name)

    return build("BartForConditionalGeneration", config, torch.float32, device)


def test_bart(device):
    """Cross-attention of lengths that differ, beside encoder and causal decoder."""
    trio = bart(device)
    ids = batch(device)[0][:1]
    decoder_ids = torch.randint(2, VOCABULARY, (1, 7), generator=torch.Generator().manual_seed(3)).to(device)

    def compute(model):
        return values_and_gradients(model, model(ids, decoder_input_ids=decoder_ids, use_cache=False).logits)

    trio.hold("logits", compute, 6)


def test_bart_generation(device):
    """Sampled, since such a small model repeats one likeliest token; the seed makes equal logits equal tokens."""
    trio = bart(device)
    ids, mask = batch(device)
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": True, "top_k": 0, "temperature": 4.0}
    options |= {"num_beams": 1, "eos_token_id": VOCABULARY}  # the end never comes

    def generate(model):
        torch.manual_seed(5)
        return model.generate(ids, **options)

    with operator_calls() as calls:
        expected = generate(trio.eager)
    assert not calls
    with operator_calls() as calls:
        assert torch.equal(generate(trio.flash), expected)
    assert calls.total() >= 2 + 10 * 4
    assert len(set(expected[0].tolist())) > 3


IMAGE, VISION_START, VISION_END = 90, 91, 92


def qwen2_vl(name: str) -> "transformers.Qwen2VLConfig":
    text = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 96, "bos_token_id": 1,
        "eos_token_id": None, "pad_token_id": 0,
        "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
    }  # fmt: skip
    vision = {"embed_dim": 32, "depth": 2, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 2, "patch_size": 4}
    return transformers.Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END, attn_implementation=name,
    )  # fmt: skip


def test_qwen2_vl(device):
    """The vision tower attends within images of different sizes, packed in one row; the text around them is dense."""
    trio = build("Qwen2VLForConditionalGeneration", qwen2_vl, torch.float32, device)
    grids = torch.tensor([[1, 4, 6], [1, 2, 4]])
    counts = grids.prod(-1)
    ids = [3, 4]
    for count in counts.tolist():
        ids += [VISION_START, *[IMAGE] * (count // 4), VISION_END, 5, 6]
    ids = torch.tensor([ids])
    pixels = torch.randn(int(counts.sum()), 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(4))
    inputs = {"input_ids": ids, "image_grid_thw": grids, "attention_mask": torch.ones_like(ids)}
    if MAJOR >= 5:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    inputs = {name: x.to(device) for name, x in inputs.items()}

    def logits(model):
        return model(**inputs, pixel_values=pixels.to(device, model.dtype), use_cache=False).logits

    trio.hold("logits", lambda model: values_and_gradients(model, logits(model)), 2, "mixed")
