"""The command as a user types it: in a pipe, in a terminal of 80 columns, and with mistakes."""

import json
import os
import pty
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from flash_attn_plus import device, env, selection
from flash_attn_plus.cli import info, words
from flash_attn_plus.cli.main import COMMANDS, main
from flash_attn_plus.errors import InvalidArgument

COMMAND = [sys.executable, "-m", "flash_attn_plus"]


def in_a_terminal(arguments, environment):
    """What the command prints when stdout and stderr are a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [*COMMAND, *arguments], env={**environment, "COLUMNS": "80"}, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    printed = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux says so that the other end is closed
            break
        if not part:
            break
        printed += part
    os.close(ours)
    assert child.wait() == 0
    return printed.decode().replace("\r\n", "\n")


def test_explaining_says_the_same_in_a_terminal_and_in_a_pipe(plain_environment):
    arguments = ["info", "--explain", "s=64 h=4 d=500 device=cpu causal grad"]
    piped = subprocess.run([*COMMAND, *arguments], env=plain_environment, capture_output=True, text=True, check=True)
    assert piped.stderr == ""
    assert "\x1b" not in piped.stdout
    assert piped.stdout.startswith("sizes: b=1 sq=64 sk=64 h=4 hk=4 d=500 dtype=bfloat16\n")  # what was not said, too
    assert "Triton reaches CPU tensors only with TRITON_INTERPRET=1" in piped.stdout
    shown = in_a_terminal(arguments, plain_environment)
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.split() == piped.stdout.split()


def test_the_engine_does_not_import_its_command_line(plain_environment):
    code = "import sys, flash_attn_plus; print([m for m in sys.modules if m.startswith('flash_attn_plus.cli')])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=plain_environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["explode"], "invalid choice: 'explode'"),
        (["info", "--explain", "hk=3"], "must divide number of heads"),
        (["verify", "--backend", "tritn"], "--backend tritn is unknown; choose one of gluon, triton"),
        (["verify", "--seconds", "0"], "--seconds must be positive"),
        (["verify", "--device", "toaster"], "--device=toaster names no device"),
        (["verify", "--seconds", "nan"], "--seconds must be positive, not nan"),
        (["bench", "--seconds", "-1"], "--seconds must be positive, not -1"),
        (["bench", "--dtype", "fp64"], "choose bf16, fp16 or fp32"),
        (["bench", "--csv", "."], "--csv . cannot be written (Is a directory)"),
        (["bench", "--csv", f"{__file__}/new.csv"], "new.csv cannot be written"),
        (["info", "--explain", "b=1000000 s=1000000000 h=1000000"], "no tensor has the shape (1000000, 1000000000,"),
        (["bench", "flight"], "flight is no suite; choose among prefill"),
        (["bench", "--lengths", "many"], "--lengths needs a positive integer"),
        (["bench", "--heads", "8", "--heads-k", "3"], "--heads 8 is no multiple of --heads-k 3"),
        (["bench", "--providers", "SDPA,tortoise"], "--providers does not know 'tortoise'; choose among ours: gluon"),
        (["bench", "--against", "absent.csv"], "--against absent.csv cannot be read"),
        (["bench", "--plot", "picture.doc"], "should end in .png"),
        (["warmup", "h=8", "causl"], "'causl' is not understood; did you mean causal"),
        (["warmup", "page=16"], "add decode"),
        (["warmup", "d=64", "--jobs", "0"], "--jobs must be positive"),
    ],
)
def test_a_mistake_gets_a_sentence_and_exit_code_2(arguments, why, capsys):
    try:
        code = main(arguments)
    except SystemExit as stop:  # argparse's own way out
        code = stop.code
    told = capsys.readouterr()
    assert code == 2
    assert why in told.err
    assert told.out == ""


def test_a_variable_without_a_meaning_gets_a_sentence(monkeypatch, capsys):
    monkeypatch.setenv(env.DEBUG, "perhaps")
    assert main(["info"]) == 2
    assert f"{env.DEBUG}='perhaps' is neither TRUE nor FALSE" in capsys.readouterr().err
    monkeypatch.delenv(env.DEBUG)
    monkeypatch.setenv(env.BACKEND, "tritn")
    assert main(["info"]) == 2
    assert "'tritn' is unknown" in capsys.readouterr().err


def test_an_interrupt_is_no_traceback(monkeypatch, capsys):
    def interrupt(_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "run", interrupt)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "flash-attn-plus info: interrupted\n"


def test_closed_streams_are_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["info", "--explain", "s=64 device=cpu"]) == 0
    assert main(["info", "--explain", "foo"]) == 2
    sys.stdout.close(), sys.stderr.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full disk to write to")
def test_a_full_disk_is_no_traceback(plain_environment):
    command = [*COMMAND, "info", "--json", "--explain", "s=64 device=cpu"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, env=plain_environment, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "flash-attn-plus info: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_that_fits_a_terminal(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--json" in text
    assert " ".join(COMMANDS[command].__doc__.split()) in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80


def test_info_tells_what_is_here(capsys, monkeypatch):
    monkeypatch.delenv(env.TUNING_TABLE, raising=False)
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"]
    assert found["versions"]["flash_attn"].startswith(("our drop-in", "not installed", "the original"))
    on_cpu = {row["backend"]: row for row in found["backends"] if row["device"] == "cpu"}
    assert set(on_cpu) == set(selection.NAMES)
    assert on_cpu["torch"]["forward"] == on_cpu["torch"]["backward"] == "chosen"
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"cpu +torch +both +chosen", text)
    assert "Tuning table: none" in text


def test_info_tells_of_an_accelerator(monkeypatch):
    where = torch.device("cuda", 0)
    properties = SimpleNamespace(total_memory=143 << 30)
    module = SimpleNamespace(get_device_name=lambda _: "a GPU", get_device_properties=lambda _: properties)
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(words, "default_device", lambda: where)
    with device.assumed(where, device.Device("cuda90", 227 * 1024, 132)):
        found = info.devices()[0]
    assert found == {
        "device": "cuda:0", "name": "a GPU", "family": "cuda90", "processors": 132, "shared memory": "227 KB",
        "memory": "143.0 GiB",
    }  # fmt: skip


def test_info_tells_whether_kernels_can_be_kept(tmp_path):
    (tmp_path / "file").touch()
    told = {name: info.cache_state(tmp_path / name)["cache writable"] for name in ("folder", "file", "file/folder")}
    assert [text[:3].rstrip(":") for text in told.values()] == ["yes", "no", "no"]


def test_info_tells_of_a_tuning_table(capsys, monkeypatch, tmp_path):
    path = tmp_path / "tiles.json"
    path.write_text("{}")
    monkeypatch.setenv(env.TUNING_TABLE, str(path))
    assert main(["info"]) == 0
    assert "does not say 'flash-attn-plus tiles, version 1' as its format" in capsys.readouterr().out


def test_info_tells_what_every_call_would_raise(capsys, monkeypatch):
    def refuse(problem):
        raise InvalidArgument("the table of tiles is wrong")

    monkeypatch.setattr(selection, "explain_problem", refuse)
    assert main(["info", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["backends"]
    assert {row["forward"] for row in rows} == {row["backward"] for row in rows} == {
        "calls raise: the table of tiles is wrong"
    }  # fmt: skip


def test_explain_answers_no_with_exit_code_1(capsys):
    with selection.use_backend("gluon"):
        assert main(["info", "--explain", "s=64 device=cpu"]) == 1
        assert "no backend serves this call" in capsys.readouterr().err
        assert main(["info", "--json", "--explain", "s=64 device=cpu grad"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["served"] is False
    assert {v["name"] for v in found["backward"]} == set(selection.NAMES)
