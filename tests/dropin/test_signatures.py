"""The interface has upstream's names, parameters, defaults and orders; the golden file is written from its contract."""

import importlib.util
import inspect
import json
import pkgutil
import types
from pathlib import Path

import flash_attn
import flash_attn_2_cuda
import pytest
import torch
from flash_attn import bert_padding
from flash_attn import flash_attn_interface as interface

GOLDEN = json.loads((Path(__file__).parent / "interface_golden.json").read_text())


def rendered(function) -> list[str]:
    """Parameters as in the golden file; keyword-only ones are ours to add."""
    parameters = inspect.signature(function).parameters.values()
    assert not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY) for p in parameters)
    return [
        p.name if p.default is p.empty else f"{p.name}={p.default!r}"
        for p in parameters
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]


@pytest.mark.parametrize("name", GOLDEN["public"])
def test_public_function(name):
    function = getattr(flash_attn, name)
    assert rendered(function) == GOLDEN["public"][name]
    assert isinstance(function, types.FunctionType)
    assert not hasattr(function, "__wrapped__")
    assert getattr(interface, name) is function
    assert inspect.getfullargspec(function).args == list(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", GOLDEN["operators"])
def test_private_operator(name):
    operator = getattr(interface, name)
    assert isinstance(operator, torch.library.CustomOpDef)
    assert rendered(operator._init_fn) == GOLDEN["operators"][name]
    assert rendered(getattr(interface, name + "_fake")) == GOLDEN["operators"][name]
    packet = getattr(torch.ops.flash_attn, name)
    assert getattr(interface, "_wrapped" + name) is packet
    assert str(packet.default._schema) == f"flash_attn::{name}{GOLDEN['schemas'][name]}"
    assert str(packet.default) == f"flash_attn.{name}.default"


@pytest.mark.parametrize("name", GOLDEN["autograd"])
def test_autograd_class(name):
    function = getattr(interface, name)
    assert issubclass(function, torch.autograd.Function)
    assert rendered(function.forward) == GOLDEN["autograd"][name]


@pytest.mark.parametrize("name", GOLDEN["raw"])
def test_raw_call(name):
    assert rendered(getattr(interface.flash_attn_gpu, name)) == GOLDEN["raw"][name]
    assert getattr(flash_attn_2_cuda, name) is getattr(interface.flash_attn_gpu, name)


@pytest.mark.parametrize("name", GOLDEN["helpers"])
def test_helper(name):
    assert rendered(getattr(interface, name)) == GOLDEN["helpers"][name]


@pytest.mark.parametrize("name", GOLDEN["bert_padding"])
def test_padding_function(name):
    assert rendered(getattr(bert_padding, name)) == GOLDEN["bert_padding"][name]


@pytest.mark.parametrize(
    ("module", "name", "parameters"),
    [
        pytest.param(module, *item, id=f"{module}.{item[0]}")
        for module, names in GOLDEN["callables"].items()
        for item in names.items()
    ],
)
def test_callable_of_a_submodule(module, name, parameters):
    found = importlib.import_module(f"flash_attn.{module}")
    for part in name.split("."):
        found = getattr(found, part)
    if isinstance(found, type):
        found, parameters = found.__init__, f"self, {parameters}"
    assert ", ".join(rendered(found)) == parameters


def test_modules_are_the_originals():
    """None is missing; what is added is private, or the fused softmax that the original dropped."""
    found = {
        info.name.removeprefix("flash_attn.") for info in pkgutil.walk_packages(flash_attn.__path__, "flash_attn.")
    }
    public = {name for name in found if not any(part.startswith("_") for part in name.split("."))}
    assert public - {"fused_softmax"} == set(GOLDEN["modules"])


def test_numbers_of_results(device):
    """Callers unpack exactly so many."""
    q = torch.randn(2, 4, 2, 16, device=device)
    rows, starts = q.flatten(0, 1), torch.tensor([0, 4, 8], dtype=torch.int32, device=device)
    packed = {"qkv": torch.stack((q, q, q), 2), "kv": torch.stack((q, q), 2)}
    calls = {
        "flash_attn_func": (q, q, q),
        "flash_attn_kvpacked_func": (q, packed["kv"]),
        "flash_attn_qkvpacked_func": (packed["qkv"],),
        "flash_attn_varlen_func": (rows, rows, rows, starts, starts, 4, 4),
        "flash_attn_varlen_kvpacked_func": (rows, packed["kv"].flatten(0, 1), starts, starts, 4, 4),
        "flash_attn_varlen_qkvpacked_func": (packed["qkv"].flatten(0, 1), starts, 4),
    }
    for name, arguments in calls.items():
        for dropout_p in (0.0, 0.2):
            assert isinstance(getattr(flash_attn, name)(*arguments, dropout_p=dropout_p), torch.Tensor)
            assert len(getattr(flash_attn, name)(*arguments, dropout_p=dropout_p, return_attn_probs=True)) == 3
    assert isinstance(flash_attn.flash_attn_with_kvcache(q, q.clone(), q.clone()), torch.Tensor)
    assert len(flash_attn.flash_attn_with_kvcache(q, q.clone(), q.clone(), return_softmax_lse=True)) == 2
    options = (0.0, 0.25, False, -1, -1, 0.0, None)
    out, lse, dump, state = interface._flash_attn_forward(q, q, q, *options, False)
    grads = [torch.empty_like(q) for _ in range(3)]
    assert isinstance(interface._flash_attn_backward(q, q, q, q, out, lse, *grads, *options, False), torch.Tensor)
    sequences = (starts, starts, 4, 4)
    out, lse, dump, state = interface._flash_attn_varlen_forward(rows, rows, rows, *sequences, *options[:3])
    grads = [torch.empty_like(rows) for _ in range(3)]
    arguments = (rows, rows, rows, rows, out, lse, *grads, *sequences, *options, False)
    assert isinstance(interface._flash_attn_varlen_backward(*arguments), torch.Tensor)
    assert dump.numel() == 0
    assert state.shape == (2,)
    mask = torch.ones(2, 4, dtype=torch.bool, device=device)
    assert len(bert_padding.unpad_input(q, mask)) == 5
    lengths = torch.tensor([[1, 3, 0, 0], [2, 0, 0, 0]], device=device)
    assert len(bert_padding.unpad_input_for_concatenated_sequences(q, lengths)) == 4


def test_feature_parameters_are_found_by_name():
    features = {"dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes", "deterministic"}
    assert features <= inspect.signature(interface.flash_attn_func).parameters.keys()
    assert features <= inspect.signature(interface.flash_attn_varlen_func).parameters.keys()


def test_version():
    import flash_attn_plus

    assert flash_attn.__version__ == "2.8.3"
    assert flash_attn.__plus_version__ == flash_attn_plus.__version__
    assert interface.USE_TRITON_ROCM is False


def test_names_that_belong_to_other_distributions_are_absent():
    root = Path(flash_attn.__file__).parent
    assert not (root / "cute").exists()
    assert not (root.parent / "flash_attn_interface.py").exists()
    assert not (root.parent / "flash_attn_3").exists()
    assert importlib.util.find_spec("flash_attn_3") is None
    assert {p.name for p in root.parent.iterdir() if not p.name.endswith((".egg-info", "__pycache__"))} == {
        "flash_attn",
        "flash_attn_2_cuda.py",
    }


@pytest.mark.parametrize(
    ("head_dim", "plain", "dropout"),
    [(16, 128, 128), (32, 128, 128), (64, 128, 64), (96, 64, 64), (128, 64, 32), (192, 64, 64), (256, 64, 64)],
)
def test_block_size_n(head_dim, plain, dropout):
    device = torch.device("cpu")
    for is_causal in (False, True):
        assert interface._get_block_size_n(device, head_dim, False, is_causal) == plain
        assert interface._get_block_size_n(device, head_dim, True, is_causal) == dropout


def test_block_size_n_beyond_256():
    with pytest.raises(AssertionError):
        interface._get_block_size_n(torch.device("cpu"), 257, True, False)


@pytest.mark.parametrize("capability", [(8, 6), (8, 9)])
def test_block_size_n_of_small_shared_memory(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda")
    assert interface._get_block_size_n(device, 128, False, True) == 64
    assert interface._get_block_size_n(device, 128, False, False) == 32
    assert interface._get_block_size_n(device, 128, True, True) == 32
    assert interface._get_block_size_n(device, 64, False, False) == 128


def test_helpers():
    x = torch.randn(4, 6)
    assert interface.maybe_contiguous(None) is None
    assert interface.maybe_contiguous(x) is x
    assert interface.maybe_contiguous(x[:, :3]).data_ptr() == x.data_ptr()
    turned = interface.maybe_contiguous(x.T)
    assert turned.stride(-1) == 1
    assert torch.equal(turned, x.T)
    assert [interface.round_multiple(n, 128) for n in (0, 1, 128, 129)] == [0, 128, 128, 256]
