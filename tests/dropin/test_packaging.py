"""The built distributions, installed as users install them: names, versions, swapping with the original, detection."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = re.compile(r"(__editable__.*)?flash_att", re.IGNORECASE)

REPORT = """
import importlib.metadata as metadata, importlib.util, json, flash_attn
from flash_attn_2_cuda import varlen_bwd
distributions = metadata.packages_distributions()
print(json.dumps({
    "file": flash_attn.__file__,
    "version": flash_attn.__version__,
    "metadata": [metadata.version("flash_attn"), metadata.version("flash-attn")],
    "owners": sorted({name.replace("_", "-") for name in distributions["flash_attn"]}),
    "engine": metadata.version("flash-attention-plus"),
    "has_cute": importlib.util.find_spec("flash_attn.cute") is not None,
}))
"""


def call(*command: str | Path, may_fail: bool = False) -> str:
    """stdout of a command that must succeed, with nothing of this process on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment, timeout=300)
    assert may_fail or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


class Environment:
    """A virtual environment that sees the third-party packages of this one, but not the project."""

    def __init__(self, folder: Path, borrowed: Path):
        venv.create(folder, with_pip=False)
        self.python = folder / "bin" / "python"
        paths = {"base": str(folder), "platbase": str(folder)}
        self.site = Path(sysconfig.get_path("purelib", "venv", vars=paths))
        (self.site / "borrowed.pth").write_text(str(borrowed))

    def pip(self, *arguments: str | Path, may_fail: bool = False) -> str:
        return call(sys.executable, "-m", "pip", "--python", self.python, *arguments, may_fail=may_fail)

    def complaints(self) -> list[str]:
        """What `pip check` says of the project's distributions; the borrowed ones may disagree among themselves."""
        return [line for line in self.pip("check", may_fail=True).splitlines() if "flash" in line]

    def install(self, *wheels: Path) -> None:
        self.pip("install", "--no-deps", "--no-compile", "--force-reinstall", *wheels)

    def uninstall(self, name: str) -> None:
        self.pip("uninstall", "--yes", name)

    def run(self, code: str) -> str:
        return call(self.python, "-c", code)

    def report(self) -> dict:
        return json.loads(self.run(REPORT))


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy of what is packaged, so that building leaves nothing in the checkout."""
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path_factory.mktemp("sources") / "project"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ("src", "dropin"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheels(sources, tmp_path_factory) -> dict[str, Path]:
    """The wheels of the engine and of the drop-in."""
    folder = tmp_path_factory.mktemp("wheels")
    call(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, sources,
        sources / "dropin",
    )  # fmt: skip
    return {path.name.split("-")[0]: path for path in folder.glob("*.whl")}


@pytest.fixture(scope="module")
def borrowed(tmp_path_factory) -> Path:
    """Links to the installed third-party packages."""
    folder = tmp_path_factory.mktemp("borrowed")
    for site in (Path(path) for path in sys.path if path.endswith(("site-packages", "dist-packages"))):
        for entry in site.iterdir():
            link = folder / entry.name
            if not OURS.match(entry.name) and entry.suffix != ".pth" and not link.is_symlink():
                link.symlink_to(entry)
    return folder


@pytest.fixture
def environment(tmp_path, borrowed) -> Environment:
    return Environment(tmp_path / "venv", borrowed)


def dummy_wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> Path:
    """A wheel of another project, made of these files."""
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    tops = sorted({path.split("/")[0].removesuffix(".py") for path in files})
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/top_level.txt": "\n".join(tops) + "\n",
    }
    record = "".join(f"{path},,\n" for path in files) + f"{info}/RECORD,,\n"
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name_in_archive, text in (files | {f"{info}/RECORD": record}).items():
            archive.writestr(name_in_archive, text)
    return path


@pytest.fixture
def original(tmp_path) -> Path:
    return dummy_wheel(
        tmp_path, "flash-attn", "2.8.3",
        {
            "flash_attn/__init__.py": "__version__ = '2.8.3'\nis_original = True\n",
            "flash_attn/only_in_the_original.py": "",
            "flash_attn_2_cuda.py": "varlen_bwd = None\n",
        },
    )  # fmt: skip


@pytest.fixture
def fourth(tmp_path) -> Path:
    return dummy_wheel(tmp_path, "flash-attn-4", "4.0.0", {"flash_attn/cute/__init__.py": "name = 'cute'\n"})


def names_in(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


def test_drop_in_wheel(wheels):
    wheel = wheels["flash_attn"]
    assert wheel.name == "flash_attn-2.8.3-py3-none-any.whl"
    archive = zipfile.ZipFile(wheel)
    info = "flash_attn-2.8.3.dist-info"
    assert archive.read(f"{info}/top_level.txt").decode().split() == ["flash_attn", "flash_attn_2_cuda"]
    metadata = archive.read(f"{info}/METADATA").decode()
    assert "\nName: flash-attn\n" in metadata
    assert "\nVersion: 2.8.3\n" in metadata
    required = {re.split(r"[>=<\s]", x)[0] for x in re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)}
    assert required == {"flash-attention-plus", "torch", "einops"}
    assert {name.split("/")[0] for name in names_in(wheel)} == {"flash_attn", "flash_attn_2_cuda.py", info}
    assert not [name for name in names_in(wheel) if "/cute/" in name]
    assert f"{info}/licenses/LICENSE" in names_in(wheel)


def test_drop_in_wheel_holds_every_module(wheels):
    source = ROOT / "dropin" / "src"
    expected = {str(path.relative_to(source)) for path in source.rglob("*.py")}
    assert {name for name in names_in(wheels["flash_attn"]) if name.endswith(".py")} == expected


def test_engine_wheel_owns_nothing_of_the_original(wheels):
    tops = {name.split("/")[0] for name in names_in(wheels["flash_attention_plus"])}
    assert "flash_attn_plus" in tops
    assert not tops & {"flash_attn", "flash_attn_2_cuda.py", "flash_attn_interface.py", "flash_attn_3"}


def test_installed_and_detected(environment, wheels):
    environment.install(*wheels.values())
    report = environment.report()
    assert Path(report["file"]).is_relative_to(environment.site)
    assert report["version"] == "2.8.3"
    assert report["metadata"] == ["2.8.3", "2.8.3"]
    assert report["owners"] == ["flash-attn"]
    assert not report["has_cute"]
    assert environment.complaints() == []
    environment.pip("install", "flash-attn==2.8.3", "flash_attn>=2.6.3,<2.8.4")
    printed = environment.run(
        "import torch, flash_attn; x = torch.ones(1, 4, 2, 8); print(flash_attn.flash_attn_func(x, x, x).sum().item())"
    )
    assert float(printed) == 64.0


def test_swaps_with_the_original_both_ways(environment, wheels, original):
    environment.install(wheels["flash_attention_plus"], original)
    assert environment.run("import flash_attn; print(flash_attn.is_original)").strip() == "True"
    environment.install(wheels["flash_attn"])
    assert environment.report()["metadata"] == ["2.8.3", "2.8.3"]
    assert not (environment.site / "flash_attn" / "only_in_the_original.py").exists()
    environment.install(original)
    assert environment.run("import flash_attn; print(flash_attn.is_original)").strip() == "True"
    assert not (environment.site / "flash_attn" / "flash_attn_interface.py").exists()
    environment.uninstall("flash-attn")
    assert not (environment.site / "flash_attn").exists()
    assert not (environment.site / "flash_attn_2_cuda.py").exists()


def test_missing_engine_is_reported(environment, wheels):
    environment.install(wheels["flash_attn"])
    assert environment.complaints() == ["flash-attn 2.8.3 requires flash-attention-plus, which is not installed."]


def test_beside_flash_attn_4(environment, wheels, fourth):
    environment.install(*wheels.values(), fourth)
    report = environment.report()
    assert report["owners"] == ["flash-attn", "flash-attn-4"]
    assert report["has_cute"]
    environment.uninstall("flash-attn-4")
    assert not environment.report()["has_cute"]
    environment.install(fourth)
    environment.uninstall("flash-attn")
    assert environment.run("import flash_attn.cute as cute; print(cute.name)").strip() == "cute"
    assert not (environment.site / "flash_attn" / "flash_attn_interface.py").exists()


def test_editable_install_beside_flash_attn_4(environment, sources, fourth):
    environment.install(fourth)
    for project in (sources, sources / "dropin"):
        environment.pip("install", "--no-deps", "--no-compile", "--no-build-isolation", "-e", project)
    report = environment.report()
    assert Path(report["file"]).is_relative_to(sources)
    assert report["metadata"] == ["2.8.3", "2.8.3"]
    assert "flash-attn" in report["owners"]
    assert report["has_cute"]


LIBRARIES = {
    "transformers": """
        import transformers.utils.import_utils as utils
        utils.is_torch_cuda_available = lambda: True
        import torch
        torch.cuda.is_available = lambda: True
        print(utils.is_flash_attn_2_available())
    """,
    "diffusers": """
        from diffusers.utils import is_flash_attn_available, is_flash_attn_version
        print(is_flash_attn_available() and is_flash_attn_version(">=", "2.6.3"))
    """,
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_libraries_own_check(library, environment, wheels):
    pytest.importorskip(library)
    environment.install(*wheels.values())
    code = "\n".join(line.strip() for line in LIBRARIES[library].splitlines())
    assert environment.run(code).strip().splitlines()[-1] == "True"
