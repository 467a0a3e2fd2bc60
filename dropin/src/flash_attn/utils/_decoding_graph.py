"""Decoding steps recorded as CUDA graphs, with the key/value cache they were recorded on."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from flash_attn.layers.rotary import RotaryEmbedding


@dataclass
class InferenceParams:
    """What the layers of a model share while it generates.

    Attributes:
        max_seqlen, max_batch_size: room of the caches.
        seqlen_offset: tokens already in the caches.
        batch_size_offset: row of the caches where this batch begins.
        key_value_memory_dict: cache of each layer, (max_batch_size, max_seqlen, 2, hk, d).
        lengths_per_sample: int32 (max_batch_size,), tokens of each sequence in the caches; in its presence it counts
            instead of `seqlen_offset`, so that a recorded graph can be replayed at any length.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)
    lengths_per_sample: torch.Tensor | None = None

    def reset(self, max_seqlen, max_batch_size):
        """Start again with empty caches, which stay allocated."""
        self.max_seqlen = max_seqlen
        self.max_batch_size = max_batch_size
        self.seqlen_offset = 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


def allocate_inference_cache(max_batch_size, max_seqlen, nheads, headdim, layers, device, dtype=torch.float16):
    """Uninitialised caches (max_batch_size, max_seqlen, 2, nheads, headdim) by layer.

    layers: their number, or their indices.
    """
    shape = (max_batch_size, max_seqlen, 2, nheads, headdim)
    indices = range(layers) if isinstance(layers, int) else layers
    return {i: torch.empty(shape, device=device, dtype=dtype) for i in indices}


@dataclass
class DecodingCGCache:
    """Recorded decoding steps, by (batch size, tokens a step), and what they were recorded on."""

    max_batch_size: int = 0
    max_seqlen: int = 0
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    callables: dict = field(default_factory=dict)
    mempool: tuple | None = None
    inference_params: InferenceParams | None = None
    run: Callable | None = None

    def __reduce__(self):
        """A copied or pickled model starts without recordings: these are steps of the model they were made of."""
        return type(self), ()


def _allocate(model, cache, batch_size, seqlen_og, max_seqlen, device, dtype):
    """Forget every recording and make room for larger ones."""
    cache.callables, cache.mempool, cache.inference_params = {}, None, None
    gc.collect()  # the old recordings hold the old memory
    cache.device, cache.dtype = device, dtype
    cache.max_batch_size, cache.max_seqlen = batch_size, max_seqlen
    assert hasattr(model, "allocate_inference_cache"), "cg=True needs a model with allocate_inference_cache"
    cache.inference_params = InferenceParams(
        max_seqlen=max_seqlen,
        max_batch_size=batch_size,
        seqlen_offset=seqlen_og,
        key_value_memory_dict=model.allocate_inference_cache(batch_size, max_seqlen, dtype),
        lengths_per_sample=torch.full((batch_size,), seqlen_og, dtype=torch.int32, device=device),
    )
    if device.type == "cuda":
        cache.mempool = torch.cuda.graphs.graph_pool_handle()


@torch.inference_mode()
def update_graph_cache(
    model, cache, batch_size, seqlen_og, max_seqlen, decoding_seqlens=(1,), tensor_parallel=1, dtype=None, n_warmups=2
):
    """A DecodingCGCache that serves the sizes asked for, reusing what `cache` already holds.

    Args:
        model: takes (input_ids, position_ids=, inference_params=, num_last_tokens=) and has
            `allocate_inference_cache(batch_size, max_seqlen, dtype)`.
        cache: the result of an earlier call, or None.
        seqlen_og: tokens of the prompt.
        max_seqlen: tokens at most, the prompt included.
        decoding_seqlens: numbers of tokens a step may have.
        tensor_parallel: ranks that record together.
        dtype: of the key/value cache; default the parameters'.
        n_warmups: steps in front of a recording.

    Returns:
        The cache; `cache.run(input_ids, position_ids, seqlen)` is a step with `seqlen` tokens in front of it. On a
        device without CUDA graphs the step is not recorded, with the same result.
    """
    cache = DecodingCGCache() if cache is None else cache
    parameter = next(iter(model.parameters()))
    device, dtype = parameter.device, dtype or parameter.dtype
    is_too_small = batch_size > cache.max_batch_size or max_seqlen > cache.max_seqlen
    if (device, dtype) != (cache.device, cache.dtype) or is_too_small:
        _allocate(model, cache, batch_size, seqlen_og, max_seqlen, device, dtype)
    for decoding_seqlen in decoding_seqlens:
        if (batch_size, decoding_seqlen) not in cache.callables:
            cache.callables[batch_size, decoding_seqlen] = capture_graph(
                model,
                cache.inference_params,
                batch_size,
                cache.max_seqlen,
                decoding_seqlen=decoding_seqlen,
                mempool=cache.mempool,
                n_warmups=n_warmups,
                tensor_parallel=tensor_parallel,
            )

    def run(input_ids, position_ids, seqlen):
        return cache.callables[tuple(input_ids.shape[:2])](input_ids, position_ids, seqlen)

    cache.run = run
    cache.inference_params.seqlen_offset = 0
    return cache


def _warm_up(step, n_warmups, tensor_parallel):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(n_warmups):
            step()
        stream.synchronize()
        if tensor_parallel > 1:  # a recording must not overlap with another rank's plain launches
            torch.distributed.barrier()
    torch.cuda.current_stream().wait_stream(stream)


@torch.inference_mode()
def capture_graph(
    model, inference_params, batch_size, max_seqlen, decoding_seqlen=1, mempool=None, n_warmups=2, tensor_parallel=1
):
    """run(input_ids, position_ids, seqlen) -> logits of one decoding step, recorded on CUDA; see `update_graph_cache`.

    The step is recorded with the caches full, and replayed with `inference_params.lengths_per_sample` set to seqlen.
    """
    rotaries = [m for m in model.modules() if isinstance(m, RotaryEmbedding)]
    assert all(m.scale is None for m in rotaries), "cg=True excludes xPos, whose tables depend on the longest sequence"
    device = next(iter(model.parameters())).device
    input_ids = torch.zeros((batch_size, decoding_seqlen), dtype=torch.long, device=device)
    position_ids = torch.zeros_like(input_ids)
    recorded_offset = max_seqlen - decoding_seqlen

    def step():
        return model(
            input_ids,
            position_ids=position_ids,
            inference_params=inference_params,
            num_last_tokens=decoding_seqlen,
        ).logits

    def fill(new_input_ids, new_position_ids, seqlen):
        inference_params.lengths_per_sample[:] = seqlen
        input_ids.copy_(new_input_ids)
        position_ids.copy_(new_position_ids)

    if device.type != "cuda":

        def run_step(new_input_ids, new_position_ids, seqlen):
            fill(new_input_ids, new_position_ids, seqlen)
            return step()

        return run_step

    offset, inference_params.seqlen_offset = inference_params.seqlen_offset, recorded_offset
    inference_params.lengths_per_sample[:] = recorded_offset
    _warm_up(step, n_warmups, tensor_parallel)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=mempool):
        logits = step()
    inference_params.seqlen_offset = offset
    # The graph reads the rotary tables where they were; a longer eager call would replace and free them.
    tables = [(m._cos_cached, m._sin_cached) for m in rotaries]

    def replay(new_input_ids, new_position_ids, seqlen, tables=tables):
        fill(new_input_ids, new_position_ids, seqlen)
        graph.replay()
        return logits.clone()

    return replay
