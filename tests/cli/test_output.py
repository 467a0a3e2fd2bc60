"""Tables lose nothing and fit a terminal; progress goes to stderr."""

import pytest

from flash_attn_plus.cli import output

LONG = "a sentence of many words that goes on well beyond what is left of a line of eighty columns, and then some more"


def test_a_table_wraps_its_last_column_in_a_terminal_only():
    rows = [("triton", "3", LONG), ("torch", "12", "ok")]
    wide = output.table_lines(("backend", "n", "answer"), rows, right=("n",))
    assert wide == ["backend   n  answer", f"triton    3  {LONG}", "torch    12  ok"]
    narrow = output.table_lines(("backend", "n", "answer"), rows, right=("n",), width=80)
    assert all(len(line) <= 80 for line in narrow)
    assert " ".join(" ".join(narrow).split()) == " ".join(" ".join(wide).split())


def test_numbers_stand_to_the_right():
    assert output.table_lines(("case", "ms"), [("a", "10.5"), ("b", "3")], right=("ms",)) == [
        "case    ms", "a     10.5", "b        3",
    ]  # fmt: skip


def test_progress_without_a_terminal_is_lines_on_stderr(capsys, monkeypatch):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(output.time, "monotonic", lambda: next(clock))
    with output.Progress("measuring", 4) as progress:
        for name in "abcd":
            progress.starts(name)
            progress.advance()
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.splitlines() == ["measuring: 4 steps", "measuring: 2 of 4 b", "measuring: 4 of 4 d"]


@pytest.mark.parametrize("why", ["", "rich is missing", "it cannot draw"])
def test_progress_in_a_terminal_is_a_bar_where_it_can_be_drawn(capsys, monkeypatch, why):
    monkeypatch.setattr(output.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "dumb" if why == "it cannot draw" else "xterm")
    if why != "rich is missing":
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(output.sys.modules, "rich.progress", None)
    with output.Progress("measuring", 1) as progress:
        progress.starts("a")
        progress.advance()
    assert ("measuring: 1 step\n" in capsys.readouterr().err) is bool(why)
