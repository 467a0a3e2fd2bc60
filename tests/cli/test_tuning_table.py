"""A table of measured tiles: what the engine takes from it, and what it says about a bad one."""

import json

import pytest
import torch

from flash_attn_plus import AttentionProblem, InvalidArgument, env
from flash_attn_plus.device import Device
from flash_attn_plus.tuning import heuristics, table
from flash_attn_plus.tuning.config import TileConfig

HOPPER = Device("cuda90", 227 * 1024, 132)
SHORT, LONG = TileConfig(64, 32, 4, 2), TileConfig(128, 32, 8, 2)


def problem(seqlen=4096, **changes):
    sizes = {"batch": 1, "seqlen_q": seqlen, "seqlen_k": seqlen, "heads": 8, "heads_k": 8, "head_dim": 128}
    return AttentionProblem(
        torch.device("cuda", 0), torch.bfloat16, **({**sizes, "head_dim_v": 128, "right": 0} | changes)
    )


def entry(config, seqlen, kernel="forward"):
    return table.Entry(table.key_of(kernel, problem(), "cuda90"), seqlen, config, 1.0, 1.25)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes entries, or a text, into the table that the environment names."""

    def write(content, name="tiles.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else table.render(content, {"device": "an H200"}))
        monkeypatch.setenv(env.TUNING_TABLE, str(path))
        return path

    return write


def test_the_nearest_measured_length_goes_before_the_built_in_tiles(written):
    built_in = heuristics.forward(problem(), HOPPER)
    written([entry(SHORT, 1024), entry(LONG, 16384)])
    assert heuristics.forward(problem(1500), HOPPER) == [SHORT, *built_in]
    assert heuristics.forward(problem(9000), HOPPER) == [LONG, *built_in]


@pytest.mark.parametrize(
    "changes",
    [
        {"right": -1}, {"left": 5}, {"head_dim": 64}, {"head_dim_v": 64}, {"has_dropout": True}, {"has_alibi": True},
        {"has_softcap": True}, {"page_size": 16}, {"has_block_mask": True},
    ],
)  # fmt: skip
def test_calls_unlike_the_measured_one_keep_the_built_in_tiles(written, monkeypatch, changes):
    built_in = heuristics.forward(problem(**changes), HOPPER)
    written([entry(SHORT, 1024)])
    assert heuristics.forward(problem(**changes), HOPPER) == built_in


def test_other_kernels_devices_and_dtypes_keep_the_built_in_tiles(written, monkeypatch):
    others = [(heuristics.dkdv, problem(), HOPPER), (heuristics.forward, problem(), HOPPER._replace(family="cuda80"))]
    others.append((heuristics.forward, problem()._replace(dtype=torch.float16), HOPPER))
    built_in = [ask(p, device) for ask, p, device in others]
    written([entry(SHORT, 1024)])
    assert [ask(p, device) for ask, p, device in others] == built_in


def test_tiles_beyond_the_shared_memory_are_not_used(written):
    small = HOPPER._replace(shared_memory=64 * 1024)
    built_in = heuristics.forward(problem(), small)
    written([entry(TileConfig(256, 256, 8, 3), 4096)])
    assert heuristics.forward(problem(), small) == built_in


def test_taking_the_variable_away_takes_the_table_away(written, monkeypatch):
    written([entry(SHORT, 1024)])
    assert heuristics.forward(problem(), HOPPER)[0] == SHORT
    before = env.snapshot()
    monkeypatch.delenv(env.TUNING_TABLE)
    assert heuristics.forward(problem(), HOPPER)[0] != SHORT
    assert env.snapshot() != before


def test_a_search_measures_with_one_configuration_and_no_other(written):
    written([entry(SHORT, 1024)])
    with table.only("forward", LONG):
        assert heuristics.forward(problem(), HOPPER) == [LONG]
        assert LONG not in heuristics.dq(problem(), HOPPER)
    assert heuristics.forward(problem(), HOPPER)[0] == SHORT


def test_what_is_written_is_what_is_read(tmp_path):
    entries = [entry(SHORT, 1024), entry(LONG, 2048, "dq")]
    assert table.parse("t", table.render(entries, {"device": "x"})) == entries


def test_a_table_from_before_descriptors_is_read(written):
    older = json.loads(table.render([entry(SHORT, 1024)], {}))
    del older["entries"][0]["config"]["by_descriptor"]
    written(json.dumps(older))
    assert heuristics.forward(problem(), HOPPER)[0] == SHORT


@pytest.mark.parametrize("changes", [{"is_varlen_k": True}, {"has_seqused_k": True}, {"has_leftpad_k": True}])
def test_descriptors_are_for_dense_calls_whatever_a_table_says(written, changes):
    built_in = heuristics.forward(problem(**changes), HOPPER)
    described = SHORT._replace(by_descriptor=True)
    written([entry(described, 1024)])
    assert heuristics.forward(problem(), HOPPER)[0] == described
    assert heuristics.forward(problem(**changes), HOPPER) == built_in


GOOD = json.loads(table.render([entry(SHORT, 1024)], {}))


def bad(**changes):
    row = GOOD["entries"][0]
    config = row["config"] | changes.pop("config", {})
    return json.dumps(GOOD | {"entries": [row, row | changes | {"config": config}]})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "is no JSON"),
        ("[]", "does not say .* as its format"),
        (json.dumps(GOOD | {"format": "2"}), "does not say .* as its format"),
        (json.dumps(GOOD | {"entries": 3}), "holds no list of entries"),
        (json.dumps(GOOD | {"entries": [3]}), "entry, number 1, that is no object"),
        (bad(kernel="backward"), "number 2, whose kernel is 'backward', none of forward, dkdv, dq"),
        (bad(dtype=3), "number 2, whose dtype is 3"),
        (bad(width=True), "number 2, whose width is True"),
        (bad(has_left=0), "number 2, whose has_left is 0"),
        (bad(ms="fast"), "number 2, whose ms is 'fast'"),
        (bad(seqlen=0), "number 2, whose seqlen is 0, not positive"),
        (bad(config={"block_m": 48}), "block_m is 48, no power of two from 16 to 512"),
        (bad(config={"block_n": 8}), "block_n is 8, no power of two"),
        (bad(config={"num_warps": "4"}), "num_warps is '4'"),
        (bad(config={"num_stages": 9}), "num_stages is 9, not from 1 to 8"),
        (bad(config={"is_split": 1}), "is_split is 1"),
        (bad(config={"by_descriptor": 0}), "by_descriptor is 0"),
        (bad(config={"block_k": 16}), "config does not hold exactly block_m, block_n"),
    ],
)
def test_a_bad_table_is_refused_with_what_is_wrong_and_the_remedy(written, text, why):
    path = written(text)
    with pytest.raises(InvalidArgument, match=why) as told:
        heuristics.forward(problem(), HOPPER)
    assert str(path) in str(told.value)
    assert "flash-attn-plus tune" in str(told.value)
    assert env.TUNING_TABLE in str(told.value)


def test_a_missing_table_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv(env.TUNING_TABLE, str(tmp_path / "absent.json"))
    with pytest.raises(InvalidArgument, match=r"absent\.json cannot be read"):
        heuristics.forward(problem(), HOPPER)


def test_a_configuration_that_ran_before_does_not_outlive_its_table():
    pytest.importorskip("triton")
    from flash_attn_plus.backends import triton_launch

    ran = []
    for configs in ([SHORT, LONG], [LONG], [SHORT, LONG]):
        triton_launch.launch_first_fitting(("a call",), configs, ran.append)
    assert ran == [SHORT, LONG, SHORT]
    triton_launch.forget_fitting()
