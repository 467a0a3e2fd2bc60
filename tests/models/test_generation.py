"""Generation with a key/value cache: the tokens and logits are those of the model without one."""

import copy
import pickle

import pytest
import torch
from flash_attn.utils.generation import (
    InferenceParams,
    allocate_inference_cache,
    decode,
    decode_speculative,
    modify_logits_for_top_k_filtering,
    modify_logits_for_top_p_filtering,
    sample,
    sample_speculative,
    update_graph_cache,
)
from tiny_models import FLASH_ONLY, STRUCTURES, assert_same, make_gpt, make_ids

MODELS = [(name, fields | {"use_flash_attn": flash}) for name, fields in STRUCTURES.items() for flash in (False, True)]
MODELS += [(name, fields | {"use_flash_attn": True}) for name, fields in FLASH_ONLY.items()]
every_model = pytest.mark.parametrize(
    "fields",
    [f for _, f in MODELS],
    ids=[f"{name}-{'flash' if f['use_flash_attn'] else 'plain'}" for name, f in MODELS],
)
GRAPHS = {name: STRUCTURES[name] for name in ("positions", "rotary", "rotary-interleaved-grouped-gated")} | FLASH_ONLY
GRAPHS["rotary-8-of-16"] = STRUCTURES["rotary"] | {"rotary_emb_fraction": 0.5}


@torch.no_grad()
def greedy_without_cache(model, ids, max_length):
    while ids.shape[1] < max_length:
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    return ids


@every_model
def test_greedy_is_the_argmax_of_the_whole_sequence(fields):
    model, ids = make_gpt(fields), make_ids(3, 6)
    output = decode(ids, model, 22)
    assert torch.equal(output.sequences, greedy_without_cache(model, ids, 22))
    assert len(set(output.sequences[:, 6:].flatten().tolist())) > 4  # else hardly anything was tested
    whole = output.sequences[:, :-1]
    assert_same("scores", torch.stack(output.scores, 1), model, lambda m: m(whole).logits[:, 5:])


@every_model
def test_feeding_several_tokens_to_a_filled_cache(fields):
    model, ids = make_gpt(fields), make_ids(2, 15)
    params, logits = InferenceParams(max_seqlen=20, max_batch_size=4, batch_size_offset=1), []
    with torch.no_grad():
        for start, stop in ((0, 7), (7, 8), (8, 12), (12, 15)):
            positions = torch.arange(start, stop).expand(2, -1)
            logits.append(model(ids[:, start:stop], position_ids=positions, inference_params=params).logits)
            params.seqlen_offset = stop
    assert_same("logits", torch.cat(logits, 1), model, lambda m: m(ids).logits)


@every_model
def test_speculation_changes_no_greedy_token(fields):
    model, ids = make_gpt(fields), make_ids(1, 6)
    expected = decode(ids, model, 24)
    # A draft that is often right: the model itself, a little disturbed.
    draft = make_gpt(fields)
    with torch.no_grad():
        for p in draft.parameters():
            p.mul_(1 + 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    for model_draft, lookahead in ((draft, 3), (model, 4), (make_gpt({"n_layer": 1}), 1)):
        output = decode_speculative(ids, model, model_draft, 24, speculative_lookahead=lookahead)
        assert torch.equal(output.sequences, expected.sequences)
        assert_same("scores", output.scores, model, lambda m: m(expected.sequences[:, :-1]).logits[:, 5:])


@pytest.mark.parametrize("name", GRAPHS)
def test_decoding_steps_of_the_graph_cache(name):
    model = make_gpt(GRAPHS[name], use_flash_attn=True)
    for batch, length in ((2, 18), (1, 12), (3, 24)):
        ids = make_ids(batch, 6, seed=batch)
        expected = decode(ids, model, length)
        output = decode(ids, model, length, cg=True)
        assert torch.equal(output.sequences, expected.sequences)
        assert all(torch.equal(x, y) for x, y in zip(output.scores, expected.scores, strict=True))
    ids = make_ids(1, 6)
    output = decode_speculative(ids, model, make_gpt({}, use_flash_attn=True), 20, cg=True)
    assert torch.equal(output.sequences, decode(ids, model, 20).sequences)


def test_graph_cache_is_reused_until_it_is_too_small():
    model = make_gpt(STRUCTURES["rotary"], use_flash_attn=True)
    cache = update_graph_cache(model, None, 2, 4, 16)
    memory, steps = cache.inference_params.key_value_memory_dict, dict(cache.callables)
    assert update_graph_cache(model, cache, 1, 4, 12).inference_params.key_value_memory_dict is memory
    assert cache.callables.keys() == {(2, 1), (1, 1)}
    assert cache.callables[2, 1] is steps[2, 1]
    update_graph_cache(model, cache, 2, 4, 17)
    assert cache.inference_params.key_value_memory_dict is not memory
    assert (cache.max_batch_size, cache.max_seqlen) == (2, 17)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA graphs")
@pytest.mark.parametrize("name", GRAPHS)
def test_replayed_graphs_are_bitwise_equal_to_eager_steps(name):
    model = make_gpt(GRAPHS[name], use_flash_attn=True).to("cuda", torch.float16)
    ids = make_ids(2, 6).cuda()
    for _ in range(2):
        expected, output = decode(ids, model, 30), decode(ids, model, 30, cg=True)
        assert torch.equal(output.sequences, expected.sequences)
        assert all(torch.equal(x, y) for x, y in zip(output.scores, expected.scores, strict=True))


def test_graph_cache_needs_the_engine_and_no_xpos():
    with pytest.raises(AssertionError, match="use_flash_attn"):
        decode(make_ids(1, 4), make_gpt({}), 8, cg=True)
    with pytest.raises(AssertionError, match="xPos"):
        decode(make_ids(1, 4), make_gpt(STRUCTURES["xpos"], use_flash_attn=True), 8, cg=True)


def test_sampling_is_reproducible_by_its_seed():
    model, ids = make_gpt(STRUCTURES["rotary"]), make_ids(2, 5)

    def run(seed):
        torch.manual_seed(seed)
        return model.generate(ids, 20, top_k=0, temperature=3.0)

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_sampling_with_a_draft_is_reproducible_and_bounded():
    model, draft, ids = make_gpt({}), make_gpt({"n_layer": 1}), make_ids(1, 5)

    def run(seed):
        torch.manual_seed(seed)
        return decode_speculative(ids, model, draft, 20, top_k=5, top_p=0.9, temperature=2.0).sequences

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    with torch.no_grad():
        logits = model(run(0)).logits[:, 4:-1]
    allowed = logits.topk(5).indices
    assert bool((allowed == run(0)[:, 5:, None]).any(-1).all())


def test_top_k_keeps_the_largest():
    logits = torch.tensor([[1.0, 4.0, 2.0, 3.0], [0.0, -1.0, -2.0, -3.0]])
    modify_logits_for_top_k_filtering(logits, 2)
    assert logits.isfinite().tolist() == [[False, True, False, True], [True, True, False, False]]


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 1), (0.7, 2), (0.95, 3), (0.999, 4), (0.0, 4), (1.0, 4)])
def test_top_p_keeps_the_smallest_set(top_p, kept):
    logits = torch.tensor([0.6, 0.25, 0.12, 0.03]).log()[torch.tensor([2, 0, 3, 1])][None]
    modify_logits_for_top_p_filtering(logits, top_p)
    assert logits.isfinite().sum() == kept
    assert logits.isfinite()[0, 1]


@pytest.mark.parametrize(
    "options", [{"top_k": 0}, {"top_k": 3}, {"top_k": 0, "top_p": 0.8}, {"top_k": 3, "temperature": 2.0}]
)
def test_sampled_frequencies(options):
    torch.manual_seed(0)
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    counts = torch.bincount(sample(p.log().expand(20000, 4), **options), minlength=4) / 20000
    expected = p ** (1 / options.get("temperature", 1.0))
    expected = expected * torch.tensor(
        [1, 1, options.get("top_p", 1.0) == 1.0, options["top_k"] == 0 and "top_p" not in options]
    )
    expected = expected / expected.sum()
    deviation = (expected * (1 - expected) / 20000).sqrt()
    assert bool(((counts - expected).abs() <= 4 * deviation).all())


def test_speculation_keeps_the_distribution_of_the_model():
    torch.manual_seed(0)
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]])
    q = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    draft = sample(q.log().expand(20000, 4), top_k=0)[:, None]
    tokens, count = sample_speculative(p.log().expand(20000, 2, 4), q.log().expand(20000, 1, 4), draft, top_k=0)
    assert bool(torch.isin(count, torch.tensor([1, 2])).all())
    for rows, expected in ((tokens[:, 0], p[0]), (tokens[count == 2, 1], p[1])):
        frequency = torch.bincount(rows, minlength=4) / len(rows)
        deviation = (expected * (1 - expected) / len(rows)).sqrt()
        assert bool(((frequency - expected).abs() <= 4 * deviation).all())
    acceptance = torch.minimum(p[0], q[0]).sum()
    assert abs((count == 2).double().mean() - acceptance) < 4 * (acceptance * (1 - acceptance) / 20000) ** 0.5


def test_end_of_sequence_stops_when_all_sequences_reach_it():
    model, ids = make_gpt({}), make_ids(1, 6)
    free = decode(ids, model, 24).sequences[0]
    position = 12
    end = int(free[position])
    first = 6 + (free[6:] == end).nonzero()[0].item()
    assert torch.equal(decode(ids, model, 24, eos_token_id=end).sequences[0], free[: first + 1])
    output = decode_speculative(ids, model, model, 24, eos_token_id=end)
    assert torch.equal(output.sequences[0], free[: first + 1])
    assert output.scores.shape[1] == first + 1 - 6


def test_teacher_outputs_replace_sampled_tokens():
    model, ids = make_gpt({}), make_ids(2, 12)
    output = decode(ids[:, :5], model, 14, teacher_outputs=ids)
    assert torch.equal(output.sequences[:, :12], ids)
    assert_same("scores", torch.stack(output.scores, 1), model, lambda m: m(output.sequences[:, :-1]).logits[:, 4:])


def test_padded_tokens_are_never_chosen():
    model, ids = make_gpt({"pad_vocab_size_multiple": 16, "lm_head_bias": True}), make_ids(2, 5)
    with torch.no_grad():
        model.lm_head.bias[61:] = 1e4
    assert bool((model.generate(ids, 10)[:, 5:] >= 61).all())
    output = model.generate(ids, 10, vocab_size=61, return_dict_in_generate=True, output_scores=True)
    assert bool((output.sequences < 61).all())
    assert output.scores[0].shape == (2, 61)


def test_what_generate_returns(capsys):
    model, ids = make_gpt({}), make_ids(2, 5)
    sequences = model.generate(ids, 9)
    output = model.generate(ids, 9, return_dict_in_generate=True, enable_timing=True)
    assert torch.equal(output.sequences, sequences)
    assert output.scores is None
    assert type(output).__name__ in ("GreedySearchDecoderOnlyOutput", "GenerateDecoderOnlyOutput")
    assert "decoding time" in capsys.readouterr().out


def test_limits_are_named():
    model = make_gpt({})
    with pytest.raises(AssertionError, match="max_length"):
        decode(make_ids(1, 5), model, 5)
    with pytest.raises(AssertionError, match="one sequence"):
        decode_speculative(make_ids(2, 5), model, model, 8)
    params = InferenceParams(max_seqlen=4, max_batch_size=2)
    with pytest.raises(AssertionError, match="max_seqlen"):
        model(make_ids(2, 5), inference_params=params)
    with pytest.raises(AssertionError, match="max_batch_size"):
        model(make_ids(3, 4), inference_params=InferenceParams(max_seqlen=4, max_batch_size=2))


def test_inference_caches():
    caches = allocate_inference_cache(2, 7, 3, 8, [1, 4], "cpu")
    assert {i: tuple(x.shape) for i, x in caches.items()} == {1: (2, 7, 2, 3, 8), 4: (2, 7, 2, 3, 8)}
    assert caches[1].dtype == torch.float16
    model = make_gpt({"n_head_kv": 2})
    assert {i: tuple(x.shape) for i, x in model.allocate_inference_cache(3, 9).items()} == dict.fromkeys(
        (0, 1), (3, 9, 2, 2, 16)
    )
    params = InferenceParams(8, 2, seqlen_offset=3, lengths_per_sample=torch.tensor([3, 3]))
    params.reset(6, 1)
    assert (params.max_seqlen, params.max_batch_size, params.seqlen_offset) == (6, 1, 0)
    assert params.lengths_per_sample.tolist() == [0, 0]


def test_a_model_that_drafts_for_itself_has_two_graph_caches():
    model, ids = make_gpt(STRUCTURES["rotary"], use_flash_attn=True), make_ids(1, 6)
    expected = model.generate(ids, 16)
    assert torch.equal(decode_speculative(ids, model, model, 16, cg=True).sequences, expected)


def test_a_copied_model_has_no_recordings_of_the_original():
    model, ids = make_gpt(STRUCTURES["rotary"], use_flash_attn=True), make_ids(2, 6)
    model.generate(ids, 9, cg=True)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            clone.transformer.layers[0].mixer.out_proj.weight.normal_()
        scores = [decode(ids, clone, 9, cg=cg).scores for cg in (False, True)]
        torch.testing.assert_close(*scores)


def test_gradients_in_evaluation_after_generation():
    model, ids = make_gpt(STRUCTURES["rotary"], use_flash_attn=True).eval(), make_ids(1, 6)
    model.generate(ids, 9)
    model(ids).logits.sum().backward()
    assert model.transformer.layers[0].mixer.Wqkv.weight.grad.isfinite().all()
