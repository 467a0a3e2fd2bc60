"""What loading an engine can meet: nothing installed, imports that fail, versions too old or too new."""

import importlib.machinery
import sys
import types

import pytest
import torch
from engines import FA3_SCHEMA, Fa4, FlagGems, forget

from flash_attn_plus import AttentionProblem, NoBackend, env, explain, selection, use_backend
from flash_attn_plus.backends import cuda_cudnn, cuda_fa2_extension, cuda_fa2_torch, cuda_fa3, cuda_fa4, flaggems
from flash_attn_plus.backends.foreign import Probe, require_version

PLAIN = AttentionProblem(torch.device("cuda", 0), torch.bfloat16, 2, 4096, 4096, 16, 16, 128, 128)


@pytest.fixture
def fresh(hopper):
    """Every probe asks anew, before and after."""
    probes = (
        flaggems.PROBE,
        cuda_fa2_extension.PROBE,
        cuda_fa2_torch.PROBE,
        cuda_fa3.PROBE,
        cuda_fa4.PROBE,
        cuda_cudnn.PROBE,
    )
    for probe in probes:
        probe.forget()
    yield hopper
    for probe in probes:
        probe.forget()
    forget()


def versions(patch, **installed: str) -> None:
    def version(name: str) -> str:
        if name.replace("-", "_") not in installed:
            raise flaggems.metadata.PackageNotFoundError(name)
        return installed[name.replace("-", "_")]

    patch.setattr(flaggems.metadata, "version", version)


def install_flaggems(fresh, tmp_path, code: str, version: str = "5.0.2", triton: str = "3.6.0") -> None:
    """A package flag_gems with this code, and a Triton of this version."""
    package = tmp_path / "flag_gems"
    package.mkdir()
    (package / "__init__.py").write_text(code)
    fresh.syspath_prepend(str(tmp_path))
    fresh.setitem(sys.modules, "flag_gems", None)
    del sys.modules["flag_gems"]  # what was there before comes back after the test
    versions(fresh, flag_gems=version)
    fresh.setitem(sys.modules, "triton", types.SimpleNamespace(__version__=triton, __spec__=True))


WORKING = (
    "device, vendor_name = 'cuda', 'nvidia'\ndef flash_attn_varlen_func(): ...\nimport warnings\nwarnings.warn('loud')"
)


def flaggems_told() -> str:
    with use_backend("flaggems"):
        return "; ".join(next(v.reasons for v in explain(PLAIN) if v.name == "flaggems"))


@pytest.mark.filterwarnings("error")
def test_flaggems_is_found_quietly(fresh, tmp_path):
    install_flaggems(fresh, tmp_path, WORKING)
    assert flaggems_told() == ""


@pytest.mark.parametrize(
    "failure",
    [
        "raise ImportError('no sqlalchemy')",
        "raise RuntimeError('No device were detected on your machine !')",
        "import torch\ntorch.npu",
        "assert False, 'no CUDA'",
        "raise TypeError('unexpected keyword num_ldmatrixes')",
        "raise OSError('read-only home')",
        "device = vendor_name = ''",
    ],
)
def test_flaggems_that_fails_to_import_is_told_with_the_remedy_once_for_all(fresh, tmp_path, failure):
    install_flaggems(fresh, tmp_path, failure)
    told = flaggems_told()
    assert told.startswith("FlagGems not available: ")
    assert "pip install --no-deps" in told
    (tmp_path / "flag_gems" / "__init__.py").write_text(WORKING)
    assert flaggems_told() == told
    with use_backend("flaggems"), pytest.raises(NoBackend, match="FlagGems not available"):
        selection.choose(PLAIN)


@pytest.mark.parametrize(
    ("version", "triton", "word"),
    [
        ("4.2.0", "3.6.0", "flag_gems 4.2.0 is not among"),
        ("5.1.0", "3.6.0", "flag_gems 5.1.0 is not among"),
        ("5.3.4rc1", "3.6.0", "flag_gems 5.3.4rc1 is not among"),
        ("5.0.2", "3.2.0", "triton 3.2.0 is not among"),
        ("5.0.2", "3.7.1+git", "triton 3.7.1+git is not among"),
    ],
)
def test_flaggems_beside_the_wrong_versions_is_refused_before_it_is_imported(fresh, tmp_path, version, triton, word):
    install_flaggems(fresh, tmp_path, "raise SystemExit('imported')", version, triton)
    assert word in flaggems_told()


def test_flaggems_absent(fresh):
    versions(fresh)
    assert "PackageNotFoundError" in flaggems_told()
    assert "not installed" in "; ".join(next(v.reasons for v in explain(PLAIN) if v.name == "flaggems"))


def test_flaggems_is_not_imported_until_it_is_asked_for(fresh, tmp_path):
    install_flaggems(fresh, tmp_path, "raise SystemExit('imported')")
    explain(PLAIN)
    selection.choose(PLAIN)
    fresh.setenv(env.USE_FLAGGEMS, "FALSE")
    explain(PLAIN)
    fresh.setenv(env.USE_FLAGGEMS, "TRUE")
    with pytest.raises(SystemExit, match="imported"):
        explain(PLAIN)


def test_flaggems_on_a_vendor_it_is_not_proven_on(fresh):
    fresh.setattr(flaggems.PROBE, "_answer", (types.SimpleNamespace(vendor_name="metax", device="cuda"), None))
    assert flaggems_told() == "FlagGems' attention is not proven on devices of metax"
    fresh.setattr(flaggems.PROBE, "_answer", (types.SimpleNamespace(vendor_name="ascend", device="npu"), None))
    assert flaggems_told() == "device cuda is not FlagGems' device, npu"


def test_our_own_module_is_never_taken_for_the_original(fresh):
    import flash_attn_2_cuda

    assert flash_attn_2_cuda.__file__.endswith(".py")
    assert "no compiled flash_attn_2_cuda is installed" in cuda_fa2_extension.PROBE.failure


def test_the_original_is_found_behind_our_module_and_by_the_variable(fresh, tmp_path):
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    installed = tmp_path / f"flash_attn_2_cuda{suffix}"
    installed.write_bytes(b"no library")
    fresh.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert cuda_fa2_extension._find_extension() == str(installed)
    assert "the original flash-attn not available: ImportError" in cuda_fa2_extension.PROBE.failure
    fresh.setenv(env.CUDA_LIBRARIES, f"/elsewhere/fa3.so:/elsewhere/flash_attn_2_cuda{suffix}")
    assert cuda_fa2_extension._find_extension() == f"/elsewhere/flash_attn_2_cuda{suffix}"


def test_the_original_that_is_imported_already_is_used(fresh):
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    loaded = types.SimpleNamespace(__file__=f"x{suffix}", fwd=1, bwd=1, varlen_fwd=1, varlen_bwd=1)
    fresh.setitem(sys.modules, "flash_attn_2_cuda", loaded)
    assert cuda_fa2_extension.PROBE.value is loaded
    cuda_fa2_extension.PROBE.forget()
    del loaded.varlen_bwd
    assert "varlen_bwd" in cuda_fa2_extension.PROBE.failure


def test_torch_without_its_kernels_or_too_old(fresh):
    fresh.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert "built without FlashAttention-2; install a CUDA build" in cuda_fa2_torch.PROBE.failure
    fresh.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    cuda_fa2_torch.PROBE.forget()
    assert cuda_fa2_torch.PROBE.failure is None
    fresh.setattr(torch.backends.cudnn, "version", lambda: None)
    assert "built without cuDNN" in cuda_cudnn.PROBE.failure
    cuda_cudnn.PROBE.forget()
    fresh.setattr(torch.backends.cudnn, "version", lambda: 8902)
    assert "cuDNN 8902 is older than" in cuda_cudnn.PROBE.failure


def test_fa3_absent_or_with_another_interface(fresh):
    assert "neither flash_attn_3 nor vLLM is installed" in cuda_fa3.PROBE.failure
    for needed, word in ((set(), None), ({"softcapping"}, "without softcapping")):
        cuda_fa3.PROBE.forget()
        fresh.setattr(cuda_fa3, "_is_installed", lambda module: module == "flash_attn_3._C")
        fresh.setattr(cuda_fa3, "_MODULES", {"flash_attn_3._C": "flash_attn_plus_fake_fa3"})
        fresh.setattr(cuda_fa3, "_NEEDED", cuda_fa3._NEEDED | needed)
        fresh.setitem(sys.modules, "flash_attn_3._C", types.SimpleNamespace())
        failure = cuda_fa3.PROBE.failure
        assert failure is None if word is None else word in failure


def test_fa3_library_without_its_operator(fresh):
    fresh.setenv(env.CUDA_LIBRARIES, "/elsewhere/libfa3.so")
    fresh.setattr(torch.ops, "load_library", lambda path: None)
    assert "libfa3.so registers no operator of FlashAttention-3" in cuda_fa3.PROBE.failure


def test_torchs_operator_with_other_kernels_behind_it_is_refused(fresh, installed):
    assert cuda_fa2_torch.Fa2Torch().reasons(PLAIN) == []
    fresh.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA4", raising=False)
    assert "PyTorch's operator runs FA4" in cuda_fa2_torch.Fa2Torch().reasons(PLAIN)[0]


def test_fa3_arguments_follow_the_schema_of_each_release():
    schema = torch._C.parse_schema(FA3_SCHEMA)
    given = cuda_fa3.arguments(schema, {"q": 1, "k": 2, "v": 3, "softmax_scale": 0.5, "max_seqlen_q": None})
    assert given.keys() == {a.name for a in schema.arguments}
    assert (given["cp_world_size"], given["is_rotary_interleaved"], given["page_table"]) == (1, True, None)
    newer = torch._C.parse_schema("fwd(Tensor q, Tensor? out=None, int attention_chunk=0, int sm_margin=0) -> Tensor[]")
    assert cuda_fa3.arguments(newer, {"q": 1, "page_table": None}) == {"q": 1}
    with pytest.raises(RuntimeError, match="has no argument page_table"):
        cuda_fa3.arguments(newer, {"q": 1, "page_table": 2})


@pytest.mark.parametrize(
    ("version", "word"),
    [("4.0.0b36", None), ("3.9.1", "flash-attn-4 3.9.1 is not among"), ("4.1.0", "flash-attn-4 4.1.0 is not among")],
)
def test_fa4_by_version(fresh, version, word):
    versions(fresh, flash_attn_4=version)
    fresh.setitem(sys.modules, "flash_attn.cute", types.ModuleType("flash_attn.cute"))
    fresh.setitem(sys.modules, "flash_attn.cute.interface", Fa4)
    failure = cuda_fa4.PROBE.failure
    assert failure is None if word is None else word in failure


def test_fa4_with_another_interface(fresh):
    class Newer(Fa4):
        @staticmethod
        def _flash_attn_bwd(q, k, v, out, dout, lse, scale):
            raise AssertionError

    versions(fresh, flash_attn_4="4.0.9")
    fresh.setitem(sys.modules, "flash_attn.cute", types.ModuleType("flash_attn.cute"))
    fresh.setitem(sys.modules, "flash_attn.cute.interface", Newer)
    assert "_flash_attn_bwd has another interface, without causal" in cuda_fa4.PROBE.failure


def test_a_probe_asks_once():
    asked = []

    def load():
        asked.append(1)
        raise AttributeError("npu")

    probe = Probe("it", load, "do that")
    assert {probe.failure for _ in range(3)} == {"it not available: AttributeError: npu; do that"}
    assert asked == [1]


@pytest.mark.parametrize(
    ("found", "fits"), [("5.0", True), ("5.0.2+cu1", True), ("4.9.9", False), ("5.1", False), ("5", True), ("6", False)]
)
def test_versions_compare_by_leading_numbers(found, fits):
    if fits:
        require_version("it", found, (5, 0), (5, 1))
    else:
        with pytest.raises(RuntimeError, match=r"at least 5\.0 and below 5\.1"):
            require_version("it", found, (5, 0), (5, 1))


def test_the_stand_in_of_flaggems_has_the_real_arguments(installed):
    assert flaggems.PROBE.value is FlagGems
