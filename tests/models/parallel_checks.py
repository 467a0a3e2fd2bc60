"""Checks that two processes run together, each comparing its share with the serial module in float64."""

import traceback
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
from flash_attn.models.gpt import GPTLMHeadModel, combine_state_dicts_tp, shard_state_dict_tp
from flash_attn.modules.embedding import (
    ColumnParallelEmbedding,
    GPT2Embeddings,
    ParallelGPT2Embeddings,
    VocabParallelEmbedding,
)
from flash_attn.modules.mha import MHA, ParallelMHA
from flash_attn.modules.mlp import (
    FusedMLP,
    GatedMlp,
    Mlp,
    ParallelFusedMLP,
    ParallelGatedMlp,
    ParallelMLP,
)
from flash_attn.utils import distributed
from tiny_models import FLASH_ONLY, STRUCTURES, GPT2Config, make_gpt, make_ids, randomize
from torch import Tensor, nn

WORLD = 2
PREFIX = "transformer.layers.0."
CHECKS: dict[str, Callable] = {}


def check(function: Callable) -> Callable:
    """Register a function of the group to be run on both ranks."""
    CHECKS[function.__name__] = function
    return function


def run_checks(rank: int, store: str, results: str) -> None:
    """Run every check and write what went wrong, by name, for the parent process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    failures = {}
    for name, function in CHECKS.items():
        torch.manual_seed(0)
        try:
            function(dist.group.WORLD)
        except (AssertionError, RuntimeError, ValueError, TypeError, KeyError):
            failures[name] = traceback.format_exc()
        dist.barrier()
    torch.save(failures, f"{results}.{rank}")
    dist.destroy_process_group()


def share(x: Tensor, group, dim: int = 0) -> Tensor:
    """This rank's part of a tensor that every rank holds."""
    return x.chunk(WORLD, dim)[group.rank()]


def gathered(x: Tensor, group) -> Tensor:
    return distributed.all_gather_raw(x.detach(), group)[0]


def load_share(parallel: nn.Module, serial: nn.Module, part: str, config: GPT2Config, group) -> Callable:
    """Give `parallel` its share of the weights of `serial`; returns the function that takes the share of gradients."""

    def shard(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        named = {f"{PREFIX}{part}.{name}": x for name, x in tensors.items()}
        sharded = shard_state_dict_tp(named, config, WORLD, group.rank())
        return {name.removeprefix(f"{PREFIX}{part}."): x for name, x in sharded.items()}

    parallel.double().load_state_dict(shard(serial.double().state_dict()))
    return lambda: shard({name: p.grad for name, p in serial.named_parameters()})


def compare(parallel, serial, call_parallel, call_serial, x, shard_gradients, sequence_parallel, group) -> None:
    """Outputs, input gradients and weight gradients of both on x (rows, features)."""
    x = x.double()
    whole, own = x.clone().requires_grad_(), x
    if sequence_parallel:
        own = share(x, group)
    own = own.clone().requires_grad_()
    expected, actual = call_serial(serial, whole), call_parallel(parallel, own)
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    (expected * weight).sum().backward()
    (actual * (share(weight, group) if sequence_parallel else weight)).sum().backward()
    if sequence_parallel:
        actual, own_grad = gathered(actual, group), gathered(own.grad, group)
    else:
        own_grad = own.grad
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(own_grad, whole.grad)
    gradients = shard_gradients()
    assert gradients.keys() == dict(parallel.named_parameters()).keys()
    for name, p in parallel.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], msg=lambda text, name=name: f"{name}: {text}")


@check
def collectives(group):
    rank = group.rank()
    x = torch.arange(8.0).view(4, 2) + 10 * rank
    both = torch.cat([torch.arange(8.0).view(4, 2) + 10 * r for r in range(WORLD)])
    total = both[:4] + both[4:]
    for raw, expected in (
        (distributed.all_gather_raw, both),
        (distributed.reduce_scatter_raw, share(total, group)),
        (distributed.all_reduce_raw, total),
    ):
        assert torch.equal(raw(x.clone(), group)[0], expected)
        out, handle = raw(x.clone(), group, async_op=True)
        handle.wait()
        assert torch.equal(out, expected)
    leaf = x.clone().requires_grad_()
    for function, grad in (
        (distributed.all_gather, lambda g: sum(g + r for r in range(WORLD))[4 * rank : 4 * rank + 4]),
        (distributed.reduce_scatter, lambda g: torch.cat([g + r for r in range(WORLD)])),
        (distributed.all_reduce, lambda g: g + rank),
    ):
        out = function(leaf, group)
        g = torch.arange(float(out.numel())).view(out.shape)
        assert torch.equal(torch.autograd.grad(out, leaf, g + rank)[0], grad(g))
    assert torch.equal(leaf, x)


@check
def shared_and_sequence_parallel_parameters(group):
    rank = group.rank()
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in "ab"})
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(rank + 1.0)
            p.grad = torch.full_like(p, rank + 1.0)
    model["a"].weight._shared_params = True
    model["b"].bias._sequence_parallel = True
    model["a"].bias._sequence_parallel = True
    model["a"].bias.data, model["a"].bias.grad = model["a"].bias.data.double(), model["a"].bias.grad.double()
    distributed.sync_shared_params(model, group)
    distributed.allreduce_sequence_parallel_grad(model, group)
    assert bool((model["a"].weight == 1).all())
    assert bool((model["b"].weight == rank + 1).all())
    for name, p in model.named_parameters():
        assert bool((p.grad == (3 if name.endswith("bias") else rank + 1)).all()), name


@check
def embeddings(group):
    ids = make_ids(2, 6)
    for positions in (0, 9):
        serial = GPT2Embeddings(8, 62, positions).double()
        with torch.no_grad():
            expected = serial(ids)
        for sequence_parallel in (False, True):
            parallel = ParallelGPT2Embeddings(8, 62, positions, group, sequence_parallel=sequence_parallel)
            names = {f"transformer.embeddings.{name}": x for name, x in serial.state_dict().items()}
            sharded = shard_state_dict_tp(names, GPT2Config(), WORLD, group.rank())
            parallel.double().load_state_dict({name.split(".", 2)[2]: x for name, x in sharded.items()})
            if sequence_parallel:
                actual = gathered(parallel(ids, combine_batch_seqlen_dim=True), group).view(2, 6, 8)
            else:
                actual = parallel(ids).detach()
            torch.testing.assert_close(actual, expected)


@check
def embeddings_that_cannot_be_split(group):
    for error, make in (
        (ValueError, lambda: VocabParallelEmbedding(61, 8, process_group=group)),
        (RuntimeError, lambda: VocabParallelEmbedding(62, 8, process_group=group, padding_idx=0)),
        (ValueError, lambda: ColumnParallelEmbedding(62, 7, process_group=group)),
        (ValueError, lambda: ParallelMHA(32, 4, group, num_heads_kv=1)),
    ):
        with pytest.raises(error):
            make()


def apply(module: nn.Module, rows: Tensor) -> Tensor:
    return module(rows)


@check
def mlps(group):
    x = torch.randn(6, 16)
    cases = [
        (Mlp, partial(ParallelMLP, process_group=group), {}, "gelu_new"),
        (GatedMlp, partial(ParallelGatedMlp, process_group=group), {"multiple_of": 6}, "swiglu"),
        (GatedMlp, partial(ParallelGatedMlp, process_group=group), {"activation": nn.functional.silu}, "swiglu"),
        (FusedMLP, partial(ParallelFusedMLP, process_group=group), {"activation": "sqrelu"}, "sqrelu"),
    ]
    for serial_cls, parallel_cls, options, activation in cases:
        for sequence_parallel in (False, True):
            torch.manual_seed(0)  # shares of different size have used up different numbers
            serial = serial_cls(16, hidden_features=18, out_features=10, **options)
            parallel = parallel_cls(
                16, hidden_features=18, out_features=10, sequence_parallel=sequence_parallel, **options
            )
            config = GPT2Config(activation_function=activation)
            gradients = load_share(parallel, serial, "mlp", config, group)
            compare(parallel, serial, apply, apply, x, gradients, sequence_parallel, group)


@check
def attention(group):
    x = torch.randn(2 * 6, 48)
    cases = [
        {"num_heads": 4},
        {"num_heads": 3, "causal": True},  # one rank has two heads
        {"num_heads": 6, "num_heads_kv": 3, "rotary_emb_dim": 4, "causal": True},
        {
            "num_heads": 4,
            "num_heads_kv": 2,
            "rotary_emb_dim": 8,
            "rotary_emb_interleaved": True,
            "qkv_proj_bias": False,
        },
        {"num_heads": 3, "use_alibi": True, "use_flash_attn": True, "causal": True},
        {"num_heads": 4, "window_size": (2, 0), "use_flash_attn": True, "out_proj_bias": False, "checkpointing": True},
    ]
    for options in cases:
        for sequence_parallel in (False, True):
            torch.manual_seed(0)
            serial = MHA(48, **options)
            parallel = ParallelMHA(48, process_group=group, sequence_parallel=sequence_parallel, **options)
            config = GPT2Config(n_embd=48, n_head=options["num_heads"], n_head_kv=options.get("num_heads_kv"))
            gradients = load_share(parallel, serial, "mixer", config, group)

            def call_serial(module, rows):
                return module(rows.view(2, 6, 48)).flatten(0, 1)

            def call_parallel(module, rows):
                return module(rows, seqlen=6)

            compare(parallel, serial, call_parallel, call_serial, x, gradients, sequence_parallel, group)


MODELS = {
    "positions": {},
    "uneven": STRUCTURES["rotary"] | {"n_embd": 48, "n_head": 3},
    "gated": STRUCTURES["rotary-interleaved-grouped-gated"],
    "parallel": STRUCTURES["parallel-two-norms"] | {"lm_head_bias": True, "n_inner": 96},
    "mup": STRUCTURES["mup"],
    "alibi": FLASH_ONLY["alibi"] | {"use_flash_attn": True},
}


def make_pair(fields: dict, group, **options):
    """(serial, parallel) GPT models in float64 with the same weights."""
    fields = fields | {"vocab_size": 62, **options}
    serial = make_gpt(fields).double()
    parallel = GPTLMHeadModel(GPT2Config(**fields), process_group=group).double().eval()
    state_dict = shard_state_dict_tp(dict(serial.state_dict()), serial.config, WORLD, group.rank())
    parallel.load_state_dict(state_dict)
    return serial, parallel


@check
def models_with_their_gradients(group):
    ids = make_ids(2, 8)
    weight = torch.randn(16, 62, dtype=torch.float64)
    for fields in MODELS.values():
        for options in (
            {"sequence_parallel": False},
            {"sequence_parallel": True, "fused_dropout_add_ln": True, "use_flash_attn": True},
        ):
            serial, parallel = make_pair(fields, group, **options)
            expected, actual = serial(ids).logits.flatten(0, 1), parallel(ids).logits.reshape(16, -1)
            torch.testing.assert_close(actual, share(expected, group, 1))
            (expected * weight).sum().backward()
            (actual * share(weight, group, 1)).sum().backward()
            if options["sequence_parallel"]:
                distributed.allreduce_sequence_parallel_grad(parallel, group)
            whole = {name: p.grad for name, p in serial.named_parameters()}
            expected = shard_state_dict_tp(whole, serial.config, WORLD, group.rank())
            for name, p in parallel.named_parameters():
                torch.testing.assert_close(p.grad, expected[name], msg=lambda text, name=name: f"{name}: {text}")


@check
def generation(group):
    for fields in MODELS.values():
        for options in ({}, {"use_flash_attn": True}):
            serial, parallel = make_pair(fields, group, sequence_parallel=False, **options)
            ids = make_ids(2, 5)
            expected = serial.generate(ids, 20)
            assert torch.equal(parallel.generate(ids, 20, tensor_parallel=WORLD), expected)
    serial, parallel = make_pair(MODELS["gated"], group, sequence_parallel=False, use_flash_attn=True)
    assert torch.equal(parallel.generate(ids, 20, tensor_parallel=WORLD, cg=True), serial.generate(ids, 20))


@check
def sequence_parallel_generation_is_refused(group):
    _, parallel = make_pair({}, group)
    with pytest.raises(AssertionError, match="sequence_parallel=False"):
        parallel.generate(make_ids(2, 4), 8)


@check
def shards_make_the_whole(group):
    for fields in MODELS.values():
        model = randomize(make_gpt(fields | {"vocab_size": 62}))
        for world in (1, 2, 3):
            if world == 3 and (model.config.n_head % 3 or getattr(model.config, "n_head_kv", None)):
                continue
            parts = [shard_state_dict_tp(dict(model.state_dict()), model.config, world, r) for r in range(world)]
            whole = combine_state_dicts_tp(parts, model.config)
            assert whole.keys() == model.state_dict().keys()
            assert all(torch.equal(x, whole[name]) for name, x in model.state_dict().items())
