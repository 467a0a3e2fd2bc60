"""transformers' decoders with attn_implementation="flash_attention_2" against its eager attention."""

import importlib
import inspect

import pytest
import torch
from language_models import DECODERS, FLOAT32_DECODERS, MAJOR, VOCABULARY, admit_cpu, decoder, transformers
from programs import operator_calls

from flash_attn_plus.testing import assert_close

admit_cpu()
LAYERS = 2
STEPS = 10
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LENGTHS = (13, 4, 9)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


def padding(side: str, lengths=LENGTHS) -> torch.Tensor:
    """int64 (b, longest), ones at valid tokens."""
    columns, counts = torch.arange(max(lengths)), torch.tensor(lengths)[:, None]
    return (columns >= max(lengths) - counts if side == "left" else columns < counts).long()


def alone(model, ids) -> torch.Tensor:
    """Logits (total, vocabulary) of sequences (1, length) that are computed one by one."""
    return torch.cat([model(x, use_cache=False).logits[0] for x in ids])


def logits_and_gradients(model, logits) -> torch.Tensor:
    """Both in one tensor, logits scaled to the largest gradient so that neither hides the other's errors."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(logits)
    model.zero_grad()
    (logits * weights).sum().backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return torch.cat((logits.detach().flatten() * 20.0, grads))


CASES = [(name, dtype) for name in DECODERS for dtype in DTYPES if dtype == "bfloat16" or name in FLOAT32_DECODERS]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_dense_batch(name, dtype, device):
    ids = tokens(2, 13).to(device)

    def compute(model):
        return logits_and_gradients(model, model(ids, use_cache=False).logits)

    decoder(name, DTYPES[dtype], device).hold("logits and gradients", compute, LAYERS)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_padded_batch(name, side, dtype, device):
    ids, mask = tokens(len(LENGTHS), max(LENGTHS)).to(device), padding(side).to(device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def compute(model):
        if model is trio.flash:
            logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[mask.bool()]
        else:
            logits = alone(model, [row[m.bool()][None] for row, m in zip(ids, mask, strict=True)])
        return logits_and_gradients(model, logits)

    trio = decoder(name, DTYPES[dtype], device)
    trio.hold("logits and gradients", compute, LAYERS, " packed")


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_sequences_packed_in_one_row(name, dtype, device):
    """Positions that start again tell the sequences apart."""
    if name == "gpt2" and MAJOR < 5:
        pytest.skip("GPT-2 of transformers 4 keeps the positions from its attention")
    ids = tokens(1, sum(LENGTHS)).to(device)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None].to(device)

    def compute(model):
        if model is trio.flash:
            logits = model(ids, position_ids=positions, use_cache=False).logits[0]
        else:
            logits = alone(model, ids.split(LENGTHS, dim=1))
        return logits_and_gradients(model, logits)

    trio = decoder(name, DTYPES[dtype], device)
    trio.hold("logits and gradients", compute, LAYERS, " packed")


@pytest.mark.parametrize("name", [name for name in DECODERS if DECODERS[name][2]])
def test_what_makes_the_family_special_is_at_work(name):
    """Without its window or softcap the model answers otherwise, so the tests above would notice a dropped one."""
    _, _, plain = DECODERS[name]
    ids = tokens(2, 13)
    with torch.no_grad():
        a, b = (decoder(name, **options).flash(ids).logits for options in ({}, plain))
    assert (a - b).abs().max() > 0.1


STRATEGIES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "prompt-lookup": {"prompt_lookup_num_tokens": 3},  # several queries at once against a cache
    "no-cache": {"use_cache": False},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", FLOAT32_DECODERS)
def test_generation(name, strategy, device):
    trio = decoder(name, device=device)
    lengths = LENGTHS if strategy != "prompt-lookup" else (13,)  # which takes one sequence only
    ids, mask = tokens(len(lengths), max(lengths)).to(device), padding("left", lengths).to(device)
    if strategy == "prompt-lookup":
        ids[:, 7:] = ids[:, :6]
    options = {"attention_mask": mask, "max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0}
    options |= {"eos_token_id": VOCABULARY} | STRATEGIES[strategy]  # the end never comes
    with operator_calls() as calls:
        expected = trio.eager.generate(ids, **options)
    assert not calls
    with operator_calls() as calls:
        generated = trio.flash.generate(ids, **options)
    assert calls.total() >= (2 if strategy == "prompt-lookup" else STEPS) * LAYERS
    assert torch.equal(generated, expected)
    assert len(set(expected[0, 13:].tolist())) > 2  # else hardly anything was tested


@pytest.mark.parametrize("name", FLOAT32_DECODERS)
def test_training(name, device):
    """Losses of some steps on padded batches with checkpointed layers, the loss being the library's own."""
    ids, mask = tokens(len(LENGTHS), max(LENGTHS)).to(device), padding("right").to(device)
    labels = ids.masked_fill(mask == 0, -100)

    def loss_of(model):
        if model is trio.flash:
            return model(ids, attention_mask=mask, labels=labels, use_cache=False).loss
        rows = [row[m.bool()][None] for row, m in zip(ids, mask, strict=True)]
        losses = [model(x, labels=x, use_cache=False).loss * (x.shape[1] - 1) for x in rows]
        return sum(losses) / (sum(LENGTHS) - len(LENGTHS))

    def compute(model):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        losses = []
        for _ in range(4):
            loss = loss_of(model)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())
        assert losses[-1] < losses[0]
        return torch.stack(losses)

    trio = decoder(name, device=device)
    trio.hold("losses", compute, 2 * 4 * LAYERS, " packed")


def test_attention_dropout_reaches_our_operator(device):
    model = decoder("llama", device=device, attention_dropout=0.5).flash.train()
    ids = tokens(2, 13).to(device)

    def logits(seed):
        torch.manual_seed(seed)
        return model(ids, use_cache=False).logits

    assert torch.equal(logits(3), logits(3))
    assert not torch.equal(logits(3), logits(4))


def test_autocast(device):
    """Weights in float32 and attention in bfloat16, as mixed-precision training has it."""
    trio = decoder("llama", device=device)
    ids = tokens(2, 13).to(device)
    seen = []

    def compute(model):
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=model is not trio.reference):
            return logits_and_gradients(model, model(ids, use_cache=False).logits.to(model.dtype))

    with torch.autocast(torch.device(device).type, torch.bfloat16):
        attention = trio.flash.model.layers[0].self_attn
        attention.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
        with operator_calls() as calls:
            trio.flash(ids, use_cache=False)
    assert calls == {"forward": LAYERS}
    assert seen == [torch.bfloat16]
    assert_close("logits and gradients", compute(trio.flash).bfloat16(), compute(trio.reference), compute(trio.eager))


@pytest.mark.skipif(MAJOR < 5, reason="transformers 4 batches continuously on a GPU only")
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_continuous_batching(name, device):
    paged = importlib.import_module("transformers.integrations.flash_paged").paged_attention_forward
    if name == "mistral" and "sliding_window" not in inspect.signature(paged).parameters:
        pytest.skip("this version looks for the window where Mistral's layers have none")
    trio = decoder(name, device=device)
    prompts = [tokens(n).tolist() for n in LENGTHS]
    config = transformers.GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    fields = transformers.ContinuousBatchingConfig.__dataclass_fields__  # the tokens of a page have had two names
    page = "page_size" if "page_size" in fields else "block_size"
    batching = transformers.ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64, **{page: 32})
    with operator_calls() as calls:
        results = trio.flash.generate_batch(
            inputs=prompts, generation_config=config, continuous_batching_config=batching, progress_bar=False
        )
    assert calls.total() > 0
    for prompt, result in zip(prompts, results.values(), strict=True):
        ids = torch.tensor([prompt], device=device)
        expected = trio.eager.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert result.generated_tokens == expected[0, len(prompt) :].tolist()
