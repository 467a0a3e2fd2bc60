"""Triton's key of its own build comes from disk where an earlier process left it, and only as long as it is right."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

cache = pytest.importorskip("triton.runtime.cache")

from flash_attn_plus.backends import triton_key  # noqa: E402

KEY = """
from triton.runtime import cache
original = cache.triton_key
from flash_attn_plus.backends import triton_replay
assert cache.triton_key is not original
assert cache.triton_key() == original()
"""


@pytest.fixture
def begin(monkeypatch, tmp_path):
    """What starts a process anew, one in which Triton hashes itself to a given key: (its key, whether it hashed)."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def start(hashed: str) -> tuple[str, bool]:
        original = functools.lru_cache(lambda: hashed)
        monkeypatch.setattr(cache, "triton_key", original)
        triton_key.remember()
        return cache.triton_key(), original.cache_info().currsize > 0

    return start


def test_only_the_first_process_hashes(begin):
    assert begin("first") == ("first", True)
    assert begin("second") == ("first", False)


def test_another_build_is_hashed_anew(begin, monkeypatch, tmp_path):
    library = tmp_path / "libtriton.so"
    library.write_text("old")
    monkeypatch.setattr(triton_key, "_files", lambda: iter([library]))
    assert begin("old") == ("old", True)
    os.utime(library, ns=(0, 0))
    assert begin("touched") == ("touched", True)
    library.write_text("larger")
    assert begin("new") == ("new", True)
    assert begin("newer") == ("new", False)


@pytest.mark.parametrize("folder", ["file/below", ""])
def test_a_cache_that_cannot_be_written_changes_no_key(begin, monkeypatch, tmp_path, folder):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / folder) if folder else "")
    assert begin("first") == ("first", True)
    assert begin("second") == ("second", True)


def test_what_is_no_key_on_disk_is_hashed_anew(begin, tmp_path):
    begin("first")
    (kept,) = tmp_path.rglob("triton_key.txt")
    for content in (b"", b"\xff\xfe\xff"):
        kept.write_bytes(content)
        assert begin("second") == ("second", True)
        assert kept.read_text() == "second"


def test_a_process_that_lost_the_thread_hashes_itself(begin, monkeypatch):
    monkeypatch.setattr("threading.Thread.run", lambda self: None)
    assert begin("forked") == ("forked", True)


def test_triton_itself_is_told_once(begin):
    begin("first")
    remembered = cache.triton_key
    triton_key.remember()
    assert cache.triton_key is remembered


def test_a_triton_without_such_a_key_is_left_alone(monkeypatch):
    monkeypatch.delattr(cache, "triton_key")
    triton_key.remember()
    assert not hasattr(cache, "triton_key")


def test_files_are_those_that_triton_hashes():
    files = list(triton_key._files())
    names = {path.name for path in files}
    assert {"cache.py", "compiler.py", "core.py", "driver.py"} <= names
    assert any(name.startswith("libtriton.") for name in names)


def test_the_key_is_tritons_own(tmp_path):
    for _ in range(2):
        environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
        subprocess.run([sys.executable, "-c", KEY], env=environment, check=True, timeout=120)
    assert len(list(Path(tmp_path).rglob("triton_key.txt"))) == 1
