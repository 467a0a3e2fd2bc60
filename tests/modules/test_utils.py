"""The helpers of flash_attn.utils that need no second process."""

import json
import subprocess
import sys

import pytest
import torch
from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn.utils import benchmark, library, pretrained, testing
from flash_attn.utils.torch import custom_bwd, custom_fwd

BENCHMARKS = {
    "benchmark_forward": ["Forward"],
    "benchmark_backward": ["Backward"],
    "benchmark_combined": ["Forward + Backward"],
    "benchmark_fwd_bwd": ["Forward", "Backward"],
    "benchmark_all": ["Forward", "Backward", "Forward + Backward"],
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_runs_and_reports(name, capsys):
    x, calls = torch.randn(8, 8, requires_grad=True), []

    def function(x, scale=1.0):
        calls.append(scale)
        return x * scale, "more"

    results = getattr(benchmark, name)(function, x, scale=2.0, repeats=3, desc="here")
    pairs = [results] if len(BENCHMARKS[name]) == 1 else results
    assert len(pairs) == len(BENCHMARKS[name])
    for timer, measurement in pairs:
        assert isinstance(timer, torch.utils.benchmark.Timer)
        assert measurement.number_per_run == 3
        assert measurement.mean > 0
    assert set(calls) == {2.0}
    printed = capsys.readouterr().out
    assert all(f"here - {what} pass" in printed for what in BENCHMARKS[name])
    getattr(benchmark, name)(function, x, repeats=1, verbose=False)
    assert not capsys.readouterr().out


def test_benchmark_under_autocast():
    linear, seen = torch.nn.Linear(4, 4), []
    linear.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    options = {"repeats": 1, "verbose": False, "amp": True, "amp_dtype": torch.bfloat16}
    benchmark.benchmark_forward(linear, torch.randn(2, 4), **options)
    assert set(seen) == {torch.bfloat16}


def test_benchmark_refuses_a_gradient_of_another_shape():
    x = torch.randn(3, requires_grad=True)
    for run in (benchmark.benchmark_backward, benchmark.benchmark_combined):
        with pytest.raises(RuntimeError, match="shape"):
            run(torch.exp, x, grad=torch.ones(4), verbose=False)


def test_profiler_writes_a_trace(tmp_path, capsys):
    x, path = torch.randn(512, 512, requires_grad=True), tmp_path / "trace.json"
    benchmark.pytorch_profiler(torch.mm, x, x, trace_filename=str(path), backward=True, cpu=True)
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert {"aten::mm"} <= names
    assert "aten::mm" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_memory_needs_cuda():
    with pytest.raises(RuntimeError, match="CUDA"):
        benchmark.benchmark_memory(torch.exp, torch.ones(1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_is_the_peak():
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated() / 2**20 / 1000
    x = torch.ones(1000 * 2**18, device="cuda")  # 1000 MiB
    peak = benchmark.benchmark_memory(torch.exp, x, verbose=False)
    assert peak - before == pytest.approx(2.0, abs=0.01)


def test_custom_forward_and_backward_cast_for_cuda_autocast():
    class Double(torch.autograd.Function):
        @staticmethod
        @custom_fwd
        def forward(ctx, x):
            return x * 2

        @staticmethod
        @custom_bwd
        def backward(ctx, grad):
            return grad * 2

    x = torch.ones(2, requires_grad=True)
    Double.apply(x).sum().backward()
    assert x.grad.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("allow_decomposition", [True, False])
@pytest.mark.parametrize("schema", [None, "(Tensor x, *, float factor=2.) -> Tensor"])
def test_triton_op(allow_decomposition, schema):
    name = f"flash_attn_tests::scale_{allow_decomposition}_{schema is None}"

    def scale(x: torch.Tensor, factor: float = 2.0) -> torch.Tensor:
        return x * factor

    operator = library.triton_op(name, mutates_args=(), schema=schema, allow_decomposition=allow_decomposition)(scale)
    assert (schema or "(Tensor x, float factor=2.) -> Tensor") in str(operator._opoverload._schema)
    x = torch.ones(3)
    assert operator(x).tolist() == [2.0] * 3
    graphs = []

    def backend(graph, inputs):
        from torch._functorch.aot_autograd import aot_module_simplified

        return aot_module_simplified(graph, inputs, fw_compiler=lambda g, _: graphs.append(g) or g.forward)

    torch._dynamo.reset()
    assert torch.compile(lambda x: operator(x, factor=5.0), backend=backend, fullgraph=True)(x).tolist() == [5.0] * 3
    targets = {str(node.target) for node in graphs[0].graph.nodes}
    assert any("flash_attn_tests" in target for target in targets) == (not allow_decomposition)


def test_state_dicts_from_a_folder(tmp_path):
    parts = {"a": torch.randn(3), "b": torch.randn(2, 2)}
    with pytest.raises(OSError, match="was not found"):
        pretrained.state_dict_from_pretrained(str(tmp_path))
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.bin", "b": "two.bin"}}))
    torch.save({"a": parts["a"]}, tmp_path / "one.bin")
    with pytest.raises(OSError, match=r"two\.bin of .* was not found"):
        pretrained.state_dict_from_pretrained(str(tmp_path))
    torch.save({"b": parts["b"]}, tmp_path / "two.bin")
    sharded = pretrained.state_dict_from_pretrained(str(tmp_path))
    assert all(torch.equal(sharded[name], x) for name, x in parts.items())
    torch.save({"a": parts["a"] + 1}, tmp_path / "pytorch_model.bin")  # comes first
    whole = pretrained.state_dict_from_pretrained(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert torch.equal(whole["a"], (parts["a"] + 1).bfloat16())


def test_only_tensors_are_read(tmp_path):
    class Code:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"a": Code()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"weights_only|Unsupported"):
        pretrained.state_dict_from_pretrained(str(tmp_path))


def test_imports_are_light():
    modules = [f"flash_attn.modules.{x}" for x in ("mha", "mlp", "block", "embedding")]
    modules += [f"flash_attn.utils.{x}" for x in ("benchmark", "distributed", "generation", "library", "pretrained")]
    modules += [f"flash_attn.utils.{x}" for x in ("testing", "torch")]
    families = ("baichuan", "bert", "bigcode", "btlm", "falcon", "gpt", "gpt_neox", "gptj", "llama", "opt", "vit")
    modules += [f"flash_attn.models.{x}" for x in families]
    optional = {"transformers", "timm", "torchvision", "safetensors", "sentencepiece", "huggingface_hub"}
    code = f"""
import importlib, sys, torch
before = set(sys.modules)
for name in {modules!r}:
    importlib.import_module(name)
print(sorted({{name.split('.')[0] for name in set(sys.modules) - before}} & {optional!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("mode", ["full", "random", "third"])
def test_random_padding_mask(mode):
    torch.manual_seed(0)
    mask = testing.generate_random_padding_mask(60, 200, "cpu", mode=mode)
    lengths = mask.sum(1)
    assert torch.equal(mask, torch.arange(60) < lengths[:, None])
    assert lengths.max() == 60
    assert lengths.min() == {"full": 60, "random": 40, "third": 20}[mode]
    empty = testing.generate_random_padding_mask(60, 12, "cpu", mode=mode, zero_lengths=True).sum(1) == 0
    assert empty.nonzero().flatten().tolist() == [0, 5, 10, 11]


@pytest.mark.parametrize("packed", ["none", "kv", "qkv"])
def test_generated_inputs_fit_the_functions(packed):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 12, 2, 8, dtype=torch.float64) for _ in range(3))
    mask = testing.generate_random_padding_mask(12, 3, "cpu")
    for padding in (None, mask):
        results = testing.generate_qkv(q, k, v, padding, padding, kvpacked=packed == "kv", qkvpacked=packed == "qkv")
        if packed == "none":
            assert len(results) == 17
            q_, k_, v_, _, cu_q, cu_k, _, _, max_q, max_k, *padded, _, pad, _, _ = results
        elif packed == "kv":
            assert len(results) == 11
            q_, kv_, cu_q, cu_k, max_q, max_k, q_padded, kv_padded, pad, _, _ = results
            (k_, v_), padded = kv_.unbind(1), (q_padded, *kv_padded.unbind(2))
        else:
            assert len(results) == 6
            qkv_, cu_q, max_q, qkv_padded, pad, _ = results
            (q_, k_, v_), padded, cu_k, max_k = qkv_.unbind(1), qkv_padded.unbind(2), cu_q, max_q
        assert all(torch.equal(x, y) for x, y in zip(padded, (q, k, v), strict=True))
        out = pad(flash_attn_varlen_func(q_, k_, v_, cu_q, cu_k, max_q, max_k, causal=True))
        expected, _ = testing.attention_ref(q, k, v, padding, padding, causal=True, upcast=False)
        torch.testing.assert_close(out, expected)


def test_unused_tokens_have_room_but_do_not_count():
    q, position = torch.randn(2, 6, 1, 4), torch.arange(6)
    used = torch.tensor([[5], [2]])
    padding, unused = position < used, (position >= used) & (position < used + 1)
    results = testing.generate_qkv(q, q, q, padding, padding, query_unused_mask=unused, key_unused_mask=unused)
    q_unpad, cu_seqlens, seqused, pad = results[0], results[4], results[6], results[14]
    assert cu_seqlens.tolist() == [0, 6, 9]
    assert seqused.tolist() == [5, 2]
    assert torch.equal(pad(q_unpad), q * (padding | unused)[..., None, None])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(None, None), (3, None), (None, 2), (4, 1)])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_reference_is_the_engine(causal, window, softcap):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, s, h, 8, dtype=torch.float64) for s, h in ((9, 4), (13, 2), (13, 2)))
    out, attention = testing.attention_ref(q, k, v, causal=causal, window_size=window, softcap=softcap, upcast=False)
    sides = tuple(-1 if side is None else side for side in window)
    torch.testing.assert_close(out, flash_attn_func(q, k, v, causal=causal, window_size=sides, softcap=softcap))
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4, 9, dtype=torch.float64))
    reordered, _ = testing.attention_ref(
        q, k, v, causal=causal, window_size=window, softcap=softcap, upcast=False, reorder_ops=True
    )
    torch.testing.assert_close(out, reordered)


def test_reference_of_what_only_later_versions_have():
    torch.manual_seed(0)
    q, k, v, qv = (torch.randn(1, 8, 2, 4, dtype=torch.float64) for _ in range(4))

    def reference(**options):
        return testing.attention_ref(q, k, v, upcast=False, **options)

    _, chunked = reference(attention_chunk=4, causal=True)
    expected = torch.ones(8, 8).tril().bool()
    expected[4:, :4] = False
    assert torch.equal(chunked[0, 0] > 0, expected)
    _, sunk = reference(window_size=(1, 0), sink_token_length=2)
    assert (sunk[0, 0, 7] > 0).tolist() == [True, True, False, False, False, False, True, True]
    _, padded = reference(key_leftpad=torch.tensor([3]), causal=True, key_padding_mask=torch.arange(8)[None] >= 0)
    assert not padded[..., :3].any()
    sink = torch.tensor([0.5, -1.0], dtype=torch.float64)
    _, weights = reference(learnable_sink=sink)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / 2
    total = scores.exp().sum(-1) + sink.exp()[:, None]
    torch.testing.assert_close(weights, scores.exp() / total[..., None])
    _, both = reference(qv=qv)
    scores = torch.einsum("bthd,bshd->bhts", torch.cat((q, qv), -1), torch.cat((k, v), -1)) / 8**0.5
    torch.testing.assert_close(both, scores.softmax(-1))
    factors = {f"{x}_descale": torch.tensor([[2.0, 0.5]]) for x in "qkv"}
    scaled, _ = testing.attention_ref(q, k, v, **factors)
    factor = torch.tensor([2.0, 0.5])[:, None].double()
    torch.testing.assert_close(
        scaled, testing.attention_ref(q * factor, k * factor, v * factor)[0], rtol=1e-5, atol=1e-5
    )
    bias = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(
        reference(attn_bias=bias)[1], (torch.einsum("bthd,bshd->bhts", q, k) / 2 + bias).softmax(-1)
    )


def test_reference_drops_what_the_mask_says():
    q, k, v = (torch.randn(1, 6, 2, 4, dtype=torch.float64) for _ in range(3))
    kept = torch.rand(1, 2, 6, 6) > 0.5
    out, attention = testing.attention_ref(q, k, v, dropout_p=0.5, dropout_mask=kept, upcast=False)
    torch.testing.assert_close(out, torch.einsum("bhts,bshd->bthd", attention * kept * 2, v))
