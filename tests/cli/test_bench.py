"""`bench` times right results only, counts their work right, and compares with an earlier run."""

import csv
import json
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from flash_attn_plus import InvalidArgument
from flash_attn_plus.cli import bench, measure, providers, results, suites
from flash_attn_plus.cli.main import main

CPU = torch.device("cpu")
SIZES = ["--lengths", "40", "--batch", "2", "--heads", "4", "--heads-k", "2", "--head-dim", "16", "--device", "cpu"]
BOTH = ["--providers", "ours: torch,SDPA"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """A clock and a machine that are known: every call takes 2 ms."""
    monkeypatch.setattr(measure, "milliseconds", lambda function, _where, _seconds=0.1: (function(), 2.0)[1])
    monkeypatch.setattr(measure, "roofline", lambda *_: measure.Roofline(1.0, 10.0))


def shape(suite, **changes):
    return suites.Shape(suite, 2, 40, 4, 2, 16, torch.float32)._replace(**changes)


@pytest.mark.parametrize("suite", suites.SUITES)
def test_right_results_get_numbers(suite, capsys):
    assert main(["bench", suite, "--json", *SIZES, *BOTH]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(r["provider"], r["status"]) for r in found["rows"]] == [("ours: torch", "ok"), ("SDPA", "ok")]
    flops, moved = suites.Bench(shape(suite), CPU).work()
    for row in found["rows"]:
        assert row["ms"] == 2.0
        assert row["tflops"] == pytest.approx(flops / 2e-3 * 1e-12, rel=1e-3)
        assert row["gbps"] == pytest.approx(moved / 2e-3 * 1e-9, rel=1e-3)
        least = max(flops / 1e12, moved / 10e9)
        assert row["roofline_percent"] == pytest.approx(100 * least / 2e-3, rel=1e-3)


def test_work_is_what_the_visible_pairs_and_the_tensors_make():
    pairs, element = 40 * 41 // 2, 4
    flops, moved = suites.Bench(shape("prefill"), CPU).work()
    assert flops == 2 * 4 * pairs * 2 * (16 + 16)  # batch, heads, pairs, multiply and add, two products
    assert moved == element * 2 * 40 * 16 * (4 + 2 + 2 + 4)  # q, k, v and out
    assert suites.Bench(shape("train"), CPU).work() == (flops * 3.5, moved * 3)
    filled = sum(shape("decode").lengths)
    assert suites.Bench(shape("decode"), CPU).work() == (
        4 * filled * 4 * 16, element * 16 * (2 * 2 * 4 + 2 * filled * 2),
    )  # fmt: skip


@pytest.mark.parametrize("suite", suites.SUITES)
def test_every_part_of_a_small_call_is_checked(suite, monkeypatch):
    monkeypatch.setattr(suites, "_CHECKED_ROWS", 16)
    tried = suites.Bench(shape(suite), CPU)
    right = tried.call(providers.sdpa(None))()
    assert tried.wrong(right) is None
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        at = tuple(int(torch.randint(n, (1,), generator=generator)) for n in right[0].shape)
        spoilt = right[0].detach().clone()
        spoilt[at] += 0.1
        assert "out: error" in tried.wrong((spoilt, *right[1:]))


def test_a_long_call_is_checked_at_its_ends(monkeypatch):
    monkeypatch.setattr(suites, "_CHECKED_ROWS", 8)
    monkeypatch.setattr(suites, "_CHECKED_SCORES", 1)
    tried = suites.Bench(shape("prefill"), CPU)
    (right,) = tried.call(providers.sdpa(None))()
    for at in ((0, 7, 0, 3), (1, 39, 3, 3)):
        spoilt = right.clone()
        spoilt[at] += 0.1
        assert tried.wrong((spoilt,))


def test_too_little_memory_to_check_is_no_verdict(monkeypatch, capsys):
    def exhausted(*_arguments):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(suites.Bench, "wrong", exhausted)
    assert main(["bench", "prefill", *SIZES, *BOTH]) == 0
    assert "not run: SDPA: too little memory to check the result" in capsys.readouterr().out


def reversed_heads(q, k, v, causal):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal, enable_gqa=True)


def wrong_providers():
    """Each with one defect."""
    sound = providers.sdpa(None)

    def last_head(q, k, v, causal):
        out = sound.dense(q, k, v, causal).clone()
        out[-1, :, -1] *= 1.01
        return out

    def not_causal(q, k, v, _causal):
        return sound.dense(q, k, v, False)

    def unfinished(q, k, v, causal):
        return sound.dense(q, k, v, causal).index_fill(1, torch.tensor([7]), torch.nan)

    def forgotten(q, k, v, causal):  # k gets no gradient of its own
        return sound.dense(q, k.detach() + 0.0 * k, v, causal)

    return {
        "last head": last_head, "not causal": not_causal, "unfinished": unfinished, "transposed": reversed_heads,
        "no gradient": forgotten,
    }  # fmt: skip


@pytest.mark.parametrize("name", wrong_providers())
def test_a_wrong_result_gets_no_number_and_exit_code_1(name, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(providers.PEERS, "SDPA", lambda: providers.Provider(wrong_providers()[name]))
    suite = "train" if name == "no gradient" else "prefill"
    assert main(["bench", suite, *SIZES, *BOTH, "--csv", str(tmp_path / "new.csv")]) == 1
    text = capsys.readouterr().out
    assert "wrong: SDPA:" in text
    rows = {r["provider"]: r for r in csv.DictReader((tmp_path / "new.csv").open())}
    assert rows["ours: torch"]["ms"] == "2.0"
    assert [rows["SDPA"][name] for name in ("status", "ms", "tflops", "roofline_percent")] == ["wrong", "", "", ""]


def test_a_refusal_is_told_and_is_no_error(capsys, monkeypatch):
    def refuse(*_arguments):
        warnings.warn("Quick kernel not used because: (Triggered internally at a.cpp:1.)", stacklevel=1)
        warnings.warn("It wants Mondays. (Triggered internally at a.cpp:2.)", stacklevel=1)
        raise NotImplementedError("only on\nTuesdays")

    monkeypatch.setitem(providers.PEERS, "SDPA", lambda: providers.Provider(refuse))
    assert main(["bench", "prefill", "decode", *SIZES, *BOTH]) == 0
    text = capsys.readouterr().out
    assert "not served: SDPA: NotImplementedError: only on Tuesdays It wants Mondays. (b=2 s=40 h=4 hk=2 d=16)" in text
    assert "not served: SDPA: it has no such call" in text


def test_a_warning_of_a_call_that_is_served_is_shown(capsys, monkeypatch):
    def warn(*arguments):
        warnings.warn("slow today", stacklevel=1)
        return providers.dense(*arguments)

    monkeypatch.setitem(providers.PEERS, "SDPA", lambda: providers.Provider(warn))
    with pytest.warns(UserWarning, match="slow today"):
        assert main(["bench", "prefill", *SIZES, "--providers", "SDPA"]) == 0


def test_an_earlier_run_shows_how_many_times_faster(capsys, monkeypatch, tmp_path):
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    assert main(["bench", "prefill", *SIZES, "--providers", "ours: torch", "--csv", str(old)]) == 0
    old.write_text(old.read_text().replace(",ok,2.0,", ",ok,3.0,"))
    capsys.readouterr()
    assert main(["bench", "prefill", *SIZES, *BOTH, "--csv", str(new), "--against", str(old)]) == 0
    lines = {line.split("  ")[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert lines["ours: torch"].endswith("1.50x")
    assert lines["SDPA"].endswith(" -")
    assert main(["bench", "prefill", *SIZES, *BOTH, "--json", "--against", str(old)]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [r.get("times_faster") for r in rows] == [1.5, None]


def test_an_earlier_run_of_other_sizes_is_told(capsys, tmp_path):
    old = tmp_path / "old.csv"
    assert main(["bench", "prefill", *SIZES, "--providers", "ours: torch", "--csv", str(old)]) == 0
    other = [*SIZES, "--providers", "ours: torch", "--against", str(old), "--head-dim", "8"]
    assert main(["bench", "prefill", *other]) == 0
    assert "holds none of these cases; give it the same sizes" in capsys.readouterr().out


def test_a_file_that_is_no_result_is_refused(tmp_path):
    other = tmp_path / "other.csv"
    for text in ("", "a,b\n1,2\n", "\0"):
        other.write_text(text)
        with pytest.raises(InvalidArgument, match=r"other\.csv"):
            results.read_csv(other)


@pytest.mark.parametrize("time", ["0", "-3", "nan", "inf", "fast"])
def test_an_earlier_time_that_is_none_is_refused(time, tmp_path, capsys):
    old = tmp_path / "old.csv"
    assert main(["bench", "prefill", *SIZES, "--providers", "ours: torch", "--csv", str(old)]) == 0
    old.write_text(old.read_text().replace(",ok,2.0,", f",ok,{time},"))
    with pytest.raises(InvalidArgument, match=r"old\.csv cannot be read"):
        results.read_csv(old)


def test_a_plot_that_cannot_be_written_is_refused_before_anything_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench, "run_one", None)
    (tmp_path / "folder.png").mkdir()
    assert main(["bench", "--plot", str(tmp_path / "folder.png")]) == 2
    assert "folder.png cannot be written (Is a directory)" in capsys.readouterr().err
    results.check_output("--csv", tmp_path / "new.csv")
    assert [p.name for p in tmp_path.iterdir()] == ["folder.png"]  # a file that could be written is not left behind


def test_a_plot_is_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "folder" / "new.png"
    assert main(["bench", "prefill", "decode", *SIZES, *BOTH, "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_plot_is_refused_before_anything_runs(monkeypatch, capsys):
    monkeypatch.setattr(results.importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setattr(bench, "run_one", None)
    assert main(["bench", "--plot", "new.png"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_what_the_time_does_not_reach_is_told(capsys):
    assert main(["bench", "prefill", *SIZES, *BOTH, "--seconds", "1e-9"]) == 0
    text = capsys.readouterr().out
    assert "not run: SDPA: the time was up (b=2 s=40 h=4 hk=2 d=16)" in text


def test_a_drop_in_does_not_pass_for_the_original(monkeypatch):
    monkeypatch.setattr(
        providers.importlib.util, "find_spec", lambda _name: SimpleNamespace(origin="flash_attn_2_cuda.py")
    )
    with pytest.raises(ImportError, match="the original flash_attn"):
        providers.flash_attn_2()


def test_the_machine_is_measured(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(measure, "_SMALL_MATRIX", 128)
    monkeypatch.setattr(measure, "_SMALL_COPY", 1 << 16)
    monkeypatch.setattr(measure, "milliseconds", lambda f, where: (f(), 4.0)[1])
    roof = measure.roofline(CPU, torch.float32)
    assert roof.tflops == pytest.approx(2 * 128**3 / 4e-3 * 1e-12)
    assert roof.gbps == pytest.approx(2 * (1 << 16) / 4e-3 * 1e-9)


def test_a_time_is_a_median_of_calls(monkeypatch):
    monkeypatch.undo()
    calls = []
    assert 0 < measure.milliseconds(lambda: calls.append(1), CPU, 0.01) < 1.0
    assert len(calls) > 10
