"""Generation: greedy, sampled and speculative decoding with a key/value cache."""

import time
from collections import namedtuple
from functools import cache

import torch

from flash_attn.utils._decoding_graph import (
    DecodingCGCache,
    InferenceParams,
    allocate_inference_cache,
    capture_graph,
    update_graph_cache,
)

__all__ = [
    "DecodingCGCache",
    "GenerationMixin",
    "InferenceParams",
    "allocate_inference_cache",
    "capture_graph",
    "decode",
    "decode_speculative",
    "modify_logits_for_top_k_filtering",
    "modify_logits_for_top_p_filtering",
    "sample",
    "sample_speculative",
    "update_graph_cache",
]


@cache
def _output_class(name):
    """A class of transformers if it is installed, else a namedtuple of the same name."""
    try:
        from transformers import generation
    except ImportError:
        return namedtuple(name, ("sequences", "scores"))
    # Version 5 keeps only the class of which the others had become second names.
    return getattr(generation, name, None) or generation.GenerateDecoderOnlyOutput


def _output(sequences, scores, is_greedy):
    name = "GreedySearchDecoderOnlyOutput" if is_greedy else "SampleDecoderOnlyOutput"
    return _output_class(name)(sequences=sequences, scores=scores)


def modify_logits_for_top_k_filtering(logits, top_k):
    """Set all but the top_k largest of logits (..., V) to -inf, in place."""
    smallest = logits.topk(top_k, dim=-1).values[..., -1:]
    logits.masked_fill_(logits < smallest, float("-inf"))


def modify_logits_for_top_p_filtering(logits, top_p):
    """Set logits (..., V) outside the smallest set of probability top_p to -inf, in place, if 0 < top_p < 1."""
    if not 0.0 < top_p < 1.0:
        return
    ordered, indices = logits.sort(dim=-1, descending=False)
    is_out = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - top_p
    is_out[..., -1] = False  # the sum may round to less than 1
    logits.masked_fill_(is_out.scatter(-1, indices, is_out), float("-inf"))


def _filtered(logits, top_k, top_p, temperature):
    """A float32 copy of the logits with everything that must not be sampled at -inf."""
    assert top_p <= 1.0, f"top_p must be at most 1, not {top_p}"
    logits = logits.float() / temperature
    if top_k > 0:
        modify_logits_for_top_k_filtering(logits, min(top_k, logits.shape[-1]))
    modify_logits_for_top_p_filtering(logits, top_p)
    return logits


def _draw(probabilities):
    """(..., V) -> (...), one index each."""
    flat = torch.multinomial(probabilities.flatten(0, -2), num_samples=1)
    return flat.view(probabilities.shape[:-1])


def sample(logits, top_k=1, top_p=0.0, temperature=1.0):
    """One token for each row of logits (b, V).

    Args:
        top_k: sample among this many of the largest; 1 takes the largest, 0 means all.
        top_p: sample within the smallest set of this probability; 0 means all.
        temperature: divides the logits.

    Returns:
        int64 (b,).
    """
    if top_k == 1:
        return logits.argmax(dim=-1)
    return _draw(_filtered(logits, top_k, top_p, temperature).softmax(dim=-1))


class _Session:
    """A model with its key/value cache, fed token by token."""

    def __init__(
        self, model, batch_size, seqlen_og, max_length, vocab_size, tensor_parallel, cg, decoding_seqlens,
        name="_decoding_cache",
    ):  # fmt: skip
        self.model, self.vocab_size, self.graphs = model, vocab_size, None
        if cg:
            self.graphs = update_graph_cache(
                model, getattr(model, name, None), batch_size, seqlen_og, max_length, decoding_seqlens, tensor_parallel
            )
            setattr(model, name, self.graphs)
            self.params = self.graphs.inference_params
            self.params.reset(max_length, batch_size)
        else:
            self.params = InferenceParams(max_seqlen=max_length, max_batch_size=batch_size)

    def feed(self, input_ids, num_last_tokens=1):
        """Append input_ids (b, n) to the cache; logits (b, num_last_tokens, V)."""
        start, count = self.params.seqlen_offset, input_ids.shape[1]
        is_decoding, position_ids = start > 0, None
        if is_decoding:
            position_ids = torch.arange(start, start + count, device=input_ids.device).expand(input_ids.shape)
        if self.graphs is not None and is_decoding:
            logits = self.graphs.run(input_ids, position_ids, start)[:, -num_last_tokens:]
        else:
            logits = self.model(
                input_ids,
                position_ids=position_ids,
                inference_params=self.params,
                num_last_tokens=num_last_tokens,
            ).logits
        self.params.seqlen_offset += count
        return logits if self.vocab_size is None else logits[..., : self.vocab_size]


class _Timer:
    """Prints how long a block took, of all ranks."""

    def __init__(self, enabled, device, tensor_parallel):
        self.enabled, self.device, self.tensor_parallel = enabled, device, tensor_parallel

    def _now(self):
        if self.tensor_parallel > 1:
            torch.distributed.barrier()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __enter__(self):
        if self.enabled:
            self.start = self._now()

    def __exit__(self, *exception):
        if self.enabled:
            print(f"Prompt processing + decoding time: {(self._now() - self.start) * 1000:.0f}ms")


def _check_room(input_ids, max_length):
    assert max_length > input_ids.shape[1], (
        f"max_length ({max_length}) counts the prompt too and must exceed its {input_ids.shape[1]} tokens"
    )


@torch.inference_mode()
def decode(
    input_ids, model, max_length, top_k=1, top_p=0.0, temperature=1.0, eos_token_id=None, teacher_outputs=None,
    vocab_size=None, tensor_parallel=1, cg=False, enable_timing=False,
):  # fmt: skip
    """Continue prompts of equal length.

    Args:
        input_ids: int64 (b, prompt).
        model: called as (input_ids, position_ids=, inference_params=, num_last_tokens=), returns `.logits` (b, n, V).
        max_length: tokens of the result, the prompt included.
        top_k, top_p, temperature: see `sample`.
        eos_token_id: stop early once every sequence gets it at the same step.
        teacher_outputs: int64 (b, n), tokens to take instead of sampled ones as long as there are any.
        vocab_size: consider this many tokens, when the model's vocabulary is padded.
        tensor_parallel: ranks that generate together; when sampling, give them the same seed.
        cg: record each decoding step as a CUDA graph and replay it.
        enable_timing: print the time it took.

    Returns:
        An output with `sequences` (b, length) and `scores`, a tuple of the logits (b, V) of every new token.
    """
    _check_room(input_ids, max_length)
    batch, prompt = input_ids.shape
    taught = 0 if teacher_outputs is None else teacher_outputs.shape[1]
    session = _Session(model, batch, prompt, max_length, vocab_size, tensor_parallel, cg, (1,))
    tokens, scores, sequences = input_ids, [], [input_ids]
    with _Timer(enable_timing, input_ids.device, tensor_parallel):
        for position in range(prompt, max_length):
            scores.append(session.feed(tokens).squeeze(1))
            if position < taught:
                tokens = teacher_outputs[:, position : position + 1]
            else:
                tokens = sample(scores[-1], top_k, top_p, temperature).unsqueeze(1)
            sequences.append(tokens)
            if eos_token_id is not None and bool((tokens == eos_token_id).all()):
                break
    return _output(torch.cat(sequences, dim=1), tuple(scores), top_k == 1)


def _accept(tokens_draft, probabilities, probabilities_draft):
    """Bool (b, s): drafted tokens that the model keeps, each with probability min(1, p / q)."""
    p = probabilities[:, :-1].gather(-1, tokens_draft.unsqueeze(-1)).squeeze(-1)
    q = probabilities_draft.gather(-1, tokens_draft.unsqueeze(-1)).squeeze(-1)
    return torch.rand_like(p) * q < p


def sample_speculative(logits, logits_draft, tokens_draft, top_k=1, top_p=0.0, temperature=1.0):
    """Decide which drafted tokens to keep, and sample one more behind them (Leviathan et al., arXiv 2211.17192).

    The kept tokens are distributed as if sampled from the model itself.

    Args:
        logits: (b, s + 1, V) of the model, for the drafted tokens and the one behind them.
        logits_draft: (b, s, V) that the drafted tokens were sampled from.
        tokens_draft: int64 (b, s).
        top_k, top_p, temperature: see `sample`.

    Returns:
        tokens (b, s + 1), and how many of them count, int64 (b,) in [1, s + 1].
    """
    batch, drafted = tokens_draft.shape
    if top_k == 1:
        best = logits.argmax(dim=-1)
        is_kept, new_tokens = best[:, :-1] == tokens_draft, best
    else:
        p = _filtered(logits, top_k, top_p, temperature).softmax(dim=-1)
        q = _filtered(logits_draft, top_k, top_p, temperature).softmax(dim=-1)
        is_kept = _accept(tokens_draft, p, q)
        # A refused token is replaced from what the model gives beyond the draft; behind the last there is no draft.
        beyond = torch.cat(((p[:, :-1] - q).clamp(min=0.0), p[:, -1:]), dim=1)
        beyond = torch.where(beyond.sum(dim=-1, keepdim=True) > 0.0, beyond, p)
        new_tokens = _draw(beyond)
    kept = is_kept.int().cumprod(dim=-1).sum(dim=-1)
    index = torch.arange(drafted + 1, device=logits.device)
    padded = torch.cat((tokens_draft, tokens_draft.new_zeros(batch, 1)), dim=1)
    return torch.where(index < kept[:, None], padded, new_tokens), kept + 1


def _draft(session, tokens, count, options):
    """(tokens (1, count), logits (1, count, V)) sampled one after the other behind `tokens`."""
    drafted, logits = [], []
    for _ in range(count):
        logits.append(session.feed(tokens))
        tokens = sample(logits[-1].squeeze(1), *options).unsqueeze(1)
        drafted.append(tokens)
    return torch.cat(drafted, dim=1), torch.cat(logits, dim=1)


@torch.inference_mode()
def decode_speculative(
    input_ids, model, model_draft, max_length, speculative_lookahead=3, top_k=1, top_p=0.0, temperature=1.0,
    eos_token_id=None, vocab_size=None, tensor_parallel=1, cg=False, enable_timing=False, debug=False,
):  # fmt: skip
    """`decode` of one prompt, in which a smaller model drafts tokens that the model checks all at once.

    Args:
        input_ids: int64 (1, prompt).
        model_draft: a model with the same vocabulary.
        speculative_lookahead: tokens drafted at a time.
        debug: print what was drafted and kept.
        The other arguments are those of `decode`.

    Returns:
        As `decode`, but `scores` is one tensor (1, new tokens, V).
    """
    _check_room(input_ids, max_length)
    batch, prompt = input_ids.shape
    assert batch == 1, f"decode_speculative takes one sequence, not {batch}"
    options = (top_k, top_p, temperature)
    common = (batch, prompt, max_length, vocab_size, tensor_parallel, cg)
    main = _Session(model, *common, (1, *range(2, speculative_lookahead + 2)))
    # A model that drafts for itself needs two caches, or each session would overwrite the other's keys.
    draft_name = "_drafting_cache" if model_draft is model else "_decoding_cache"
    draft = _Session(model_draft, *common, (1, 2), draft_name)
    sequence, scores = input_ids, []
    with _Timer(enable_timing, input_ids.device, tensor_parallel):
        while sequence.shape[1] < max_length:
            length = sequence.shape[1]
            count = min(speculative_lookahead, max_length - length - 1)
            fresh = sequence[:, main.params.seqlen_offset :]
            if count == 0:
                logits = main.feed(fresh)
                tokens, generated = sample(logits.squeeze(1), *options).unsqueeze(1), 1
            else:
                drafted, logits_draft = _draft(draft, sequence[:, draft.params.seqlen_offset :], count, options)
                logits = main.feed(torch.cat((fresh, drafted), dim=1), num_last_tokens=count + 1)
                tokens, generated = sample_speculative(logits, logits_draft, drafted, *options)
                generated = int(generated)
                if debug:
                    print(f"drafted {drafted.tolist()[0]}, kept {generated - 1}, sampled {tokens[0, generated - 1]}")
            tokens = tokens[:, :generated]
            is_end = eos_token_id is not None and bool((tokens == eos_token_id).any())
            if is_end:
                generated = int((tokens[0] == eos_token_id).nonzero()[0]) + 1
                tokens = tokens[:, :generated]
            scores.append(logits[:, :generated])
            sequence = torch.cat((sequence, tokens), dim=1)
            if is_end:
                break
            # Forget refused tokens; the last token of the sequence has been fed to neither model.
            for session in (main, draft):
                session.params.seqlen_offset = min(session.params.seqlen_offset, sequence.shape[1] - 1)
    return _output(sequence, torch.cat(scores, dim=1), top_k == 1)


class GenerationMixin:
    """`generate` for models that `decode` can call."""

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """The caches of every layer, for the model to override."""
        raise NotImplementedError(f"{type(self).__name__} must define allocate_inference_cache")

    def generate(
        self, input_ids, max_length, top_k=1, top_p=0.0, temperature=1.0, return_dict_in_generate=False,
        output_scores=False, **kwargs,
    ):  # fmt: skip
        """`decode` with this model.

        Args:
            return_dict_in_generate: return the output of `decode` instead of its sequences alone.
            output_scores: keep its scores.
            The other arguments are those of `decode`.
        """
        output = decode(input_ids, self, max_length, top_k=top_k, top_p=top_p, temperature=temperature, **kwargs)
        if not return_dict_in_generate:
            return output.sequences
        return _output(output.sequences, output.scores if output_scores else None, top_k == 1)
