"""Tables, numbers and pictures of the documents come from the results files and the support matrix, or not at all."""

import json

import documents
import pytest

from tools import docs_hooks, readme_tables, results, support

ROW = {"suite": "attention", "metric": "forward", "unit": "TFLOP/s"}
ROWS = [
    {**ROW, "case": "4k", "provider": "ours", "value": 612.3},
    {**ROW, "case": "4k", "provider": "sdpa", "value": 0.5},
    {**ROW, "case": "8k", "provider": "ours", "value": None},
    {**ROW, "case": "4k", "provider": "ours", "metric": "backward", "value": 1234.5},
]
FILE = {"device": "some GPU", "versions": {"torch": "2.13.0"}, "rows": ROWS}


@pytest.fixture
def files(tmp_path) -> list[results.Results]:
    (tmp_path / "gpu.json").write_text(json.dumps(FILE), encoding="utf-8")
    return results.load(tmp_path)


def test_a_table_has_a_line_a_case_and_a_column_a_provider(files):
    assert results.table(files[0], "attention", ["forward"]) == [
        "| attention, forward (TFLOP/s) | ours | sdpa |",
        "| --- | --: | --: |",
        "| 4k | 612 | 0.5 |",
        "| 8k | - | - |",
    ]


def test_the_tables_of_a_suite_have_their_columns_in_one_order(files):
    rows = [results.Row("s", "c", name, metric, 1.0, "ms") for metric, name in (("a", "x"), ("a", "y"), ("b", "y"))]
    late = results.Row("s", "c", "x", "b", 2.0, "ms")
    headers = [results.table(files[0]._replace(rows=[*rows, late]), "s", [metric])[0] for metric in "ab"]
    assert headers == ["| s, a (ms) | x | y |", "| s, b (ms) | x | y |"]


def test_a_returned_value_without_a_name_has_no_dash():
    item = '<li class="doc-section-item field-body">\n  {}\u2013\n  <div>out</div>'
    assert "\u2013" not in docs_hooks.on_page_content(item.format(""))
    named = item.format("<b>q</b> ")
    assert docs_hooks.on_page_content(named) == named


def test_two_metrics_share_the_cells_of_the_readme(tmp_path):
    row = {**ROW, "suite": "hopper", "provider": "gluon", "value": 612.3}
    rows = [
        {**row, "case": "d64 s2048"},
        {**row, "case": "d64 s8192"},
        {**row, "case": "d64 s8192", "provider": "FA2 (SDPA)", "value": 0.5},
        {**row, "case": "d64 s8192", "metric": "backward", "value": 1234.5},
        {**row, "case": "d64 s512"},
        {**row, "case": "d64 s8192", "provider": "gluon, another way"},
    ]
    (tmp_path / "gpu.json").write_text(json.dumps({**FILE, "rows": rows}), encoding="utf-8")
    assert readme_tables.benchmarks(results.load(tmp_path), "en") == [
        "| hopper, forward / backward (TFLOP/s) | gluon | FA2 (SDPA) |",
        "| --- | --: | --: |",
        "| d64 s2048 | 612 / - | - / - |",
        "| d64 s8192 | 612 / 1,234 | 0.5 / - |",
        "",
        "Measured on some GPU (torch 2.13.0), `benchmarks/results/gpu.json`.",
    ]


def test_without_results_old_numbers_go():
    begin, end = readme_tables.MARKS["results"]
    old = f"a\n{begin}\n| 1 |\n{end}\nb\n"
    assert readme_tables.filled(old, {"results": readme_tables.benchmarks([], "en")}) == f"a\n{begin}\n{end}\nb\n"


def test_a_mark_becomes_its_number_and_none_becomes_a_guess(files):
    assert docs_hooks.filled("{{ value attention | 4k | sdpa | forward }}!", files) == "0.5 TFLOP/s!"
    for missing in (
        "attention | 16k | sdpa | forward",
        "attention | 8k | ours | forward",
        "decode | 4k | ours | replay",
    ):
        with pytest.raises(KeyError):
            docs_hooks.filled(f"{{{{ value {missing} }}}}", files)
    with pytest.raises(KeyError):
        docs_hooks.filled("{{ nothing }}", files)


def test_the_two_sides_of_the_cpu_benchmark_are_rows(tmp_path):
    row = {"name": "forward_causal_1024", "ours_ms": 2.0, "sdpa_ms": 4.0}
    (tmp_path / "cpu.json").write_text(json.dumps({"device": "a CPU", "torch": "2.13", "rows": [row]}))
    (found,) = results.load(tmp_path)
    assert results.cells(found.select("cpu", "time")) == {"forward causal 1024": {"flash_attn_plus": 2.0, "SDPA": 4.0}}
    assert found.versions == {"torch": "2.13"}


def test_threads_make_suites_of_their_own(tmp_path):
    row = {"name": "forward_causal_1024", "ours_ms": 2.0, "sdpa_ms": 4.0}
    content = {"device": "a CPU", "torch": "2.13", "threads": 2, "rows": [row]}
    (tmp_path / "cpu-2-threads.json").write_text(json.dumps(content))
    assert results.value("cpu, 2 threads", "forward causal 1024", "SDPA", "time", results.load(tmp_path)) == (4.0, "ms")


@pytest.mark.parametrize("path", documents.PAGES, ids=documents.name_of)
def test_every_mark_of_every_page_has_its_number(path):
    page = docs_hooks.filled(path.read_text(encoding="utf-8"), results.load())
    assert "{{" not in page


def test_pages_tell_numbers_of_measurements_by_marks_alone():
    for path in (p for p in documents.PAGES if p.stem in ("performance", "tips", "measurements")):
        typed = docs_hooks.MARK.sub("", documents.prose(path))
        for unit in ("TFLOP/s", "TB/s", "GB/s", " ms", " us", " seconds", "times faster"):
            assert unit not in typed, f"{documents.name_of(path)} holds a number in {unit} that no file backs"


def test_a_verdict_needs_every_case_in_both_passes():
    def stored(forward: str, backward: str) -> dict:
        return {"x": {"forward": {"bfloat16": forward}, "backward": {"bfloat16": backward}}}

    def verdict(forward: str, backward: str, cases: tuple[str, ...] = ("full", "causal")) -> str:
        return support.verdict(stored(forward, backward), "x", "bfloat16", cases)

    assert verdict("", "") == "both"
    assert verdict("", "causal") == "forward"
    assert verdict("causal", "") == "some"
    assert verdict("full causal", "") == "none"
    assert verdict("everything", "everything") == "none"
    assert verdict("", "", ("paged_1",)) == "forward", "paged keys have no backward pass"


def test_engines_of_one_backend_count_together():
    one = {"forward": {"bfloat16": "everything"}, "backward": {"bfloat16": "everything"}}
    other = {"forward": {"bfloat16": ""}, "backward": {"bfloat16": ""}}
    assert support.verdict({"cuda fa3": one, "cuda cudnn": other}, "cuda", "bfloat16", ("full",)) == "both"


def test_the_cases_behind_the_matrix_are_tested_cases():
    from cases import HEAD_DIMS, cache, dense, varlen

    tested = {*dense("medium"), *varlen("medium"), *cache("medium"), "head_dim_512"}
    tested |= {f"long_{name}_{d}" for name in ("full", "causal", "window", "varlen_causal") for d in (64, 128, 256)}
    assert 256 in HEAD_DIMS
    assert {case for _, cases in support.LINES.values() for case in cases} <= tested


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures_are_drawn_on_either_ground(scheme):
    pytest.importorskip("matplotlib")
    from tools import plots

    for name in plots.PICTURES:
        picture = plots.draw(name, scheme, results.load())
        assert plots.INKS[scheme]["ink"].encode() in picture, name
        assert picture == plots.draw(name, scheme, results.load()), f"{name} is not the same twice"
