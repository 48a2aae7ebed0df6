"""`pals models plan`: sizes on the command line, and what it says about machines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pals.cli.app import run
from pals.cli.options import parse_tokens
from pals.cli.plan import show_layers
from pals.engine.plan import EndsPlan, LayerPlan, ModelPlan
from pals.types import EngineLimits, ShardSpec, parse_bytes
from tests.unit.models.published import LLAMA3, PUBLISHED, shrink

MIB = 1 << 20
LIMITS = EngineLimits(max_sessions=5, max_context_tokens=2048)  # 10 MiB a layer


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[EngineLimits]:
    """Plan 80 layers of 1 GiB for any model, and note the limits that were asked for."""
    asked: list[EngineLimits] = []
    layers = LayerPlan(
        layers=tuple(range(80)), weights=1024 * MIB, kv_per_token=1024, workspace=100 * MIB
    )
    ends = EndsPlan(
        embedding=1024 * MIB, head=1024 * MIB, both=2048 * MIB, sampling=100 * MIB, bank=0
    )
    plan = ModelPlan(kinds=(layers,), ends=ends, limits=LIMITS, num_programs=16)

    def plan_model(_: object, spec: ShardSpec) -> ModelPlan:
        assert spec.dtype == "bf16"
        asked.append(spec.limits)
        return plan

    monkeypatch.setattr("pals.engine.plan.plan_model", plan_model)
    return asked


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Llama-3.1-70B"].config))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 << 30),
        ("24GB", 24 * 10**9),
        ("512MiB", 512 << 20),
        ("1.5 tib", 3 << 39),
        ("64kb", 64000),
    ],
)
def test_sizes_are_read_in_both_systems(text: str, size: int):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "24", "24G", "-1GiB", "GiB", "1e3GiB", "24 GiB each"])
def test_what_is_no_size_is_refused(text: str):
    with pytest.raises(ValueError, match="no size"):
        parse_bytes(text)


@pytest.mark.parametrize(("text", "count"), [("4096", 4096), ("32k", 32768), ("1K", 1024)])
def test_tokens_are_counted_in_1024s(text: str, count: int):
    assert parse_tokens(text) == count


@pytest.mark.parametrize("text", ["", "k", "1.5k", "-1", "1m"])
def test_what_is_no_number_of_tokens_is_refused(text: str):
    with pytest.raises(ValueError, match="no number of tokens"):
        parse_tokens(text)


@pytest.mark.parametrize(
    ("layers", "text"),
    [([0], "0:1"), ([0, 1, 2, 5], "0:3, 5:6"), ([0, 2, 4, 6], "0:1, 2:3, 4:5, …")],
)
def test_layers_are_shown_as_ranges(layers: list[int], text: str):
    assert show_layers(layers) == text


def test_machines_get_ranges_in_order_and_what_is_missing_is_said(
    planned: list[EngineLimits], model: str, capsys: pytest.CaptureFixture[str]
):
    status = run(["models", "plan", model, "--memory", "24GiB", "--memory", "48GiB"])

    out = capsys.readouterr().out
    assert status == 0
    assert out.splitlines()[-3:] == [
        "24 GiB   19               5                0:19   23.3 GiB",
        "48 GiB   40               2                19:60  47.1 GiB",
        "not enough: 20 of 80 layers are left over, 60:80; 1 more of 48 GiB would hold them",
    ]


def test_enough_machines_are_said_to_be_enough(
    planned: list[EngineLimits], model: str, capsys: pytest.CaptureFixture[str]
):
    run(["models", "plan", model, *["--memory", "64GiB"] * 3])

    assert capsys.readouterr().out.endswith("enough: 2 of 3 machines hold all layers\n")


def test_a_machine_too_small_for_any_layer_is_no_help(
    planned: list[EngineLimits], model: str, capsys: pytest.CaptureFixture[str]
):
    run(["models", "plan", model, "--memory", "1GiB"])

    *_, machine, verdict = capsys.readouterr().out.splitlines()
    assert machine.split() == ["1", "GiB", "0", "never", "enough", "-", "-"]
    assert verdict == "not enough: 80 of 80 layers are left over, 0:80"


def test_this_machine_is_planned_for_when_none_is_named(
    planned: list[EngineLimits], model: str, capsys: pytest.CaptureFixture[str]
):
    run(["models", "plan", model])

    assert " of free memory  " in capsys.readouterr().out


def test_programs_get_every_number(
    planned: list[EngineLimits], model: str, capsys: pytest.CaptureFixture[str]
):
    run(["models", "plan", model, "--memory", "24GiB", "--context", "32k", "--sessions", "2",
         "--json"])  # fmt: skip

    document = json.loads(capsys.readouterr().out)
    assert planned == [EngineLimits(max_sessions=2, max_context_tokens=32768, verify_tokens=1)]
    assert document["max_context_tokens"] == 32768
    assert document["layers"][0]["kv_bytes_per_1k_tokens"] == MIB
    assert document["total"]["weight_bytes"] == 82 << 30
    assert document["machines"][0]["shard"]["layers"] == "0:19"
    assert document["left_over"] == "19:80"


def test_a_context_beyond_the_models_is_cut_to_it(planned: list[EngineLimits], model: str):
    run(["models", "plan", model, "--context", "4000k", "--memory", "24GiB"])

    assert planned[0].max_context_tokens == LLAMA3["max_position_embeddings"]


@pytest.mark.parametrize(
    ("option", "value", "phrase"),
    [
        ("--memory", "24", "`24` is no size"),
        ("--context", "0", "Must be >= 1"),
        ("--sessions", "0", "Must be >= 1"),
    ],
)
def test_numbers_that_are_none_are_refused(
    model: str, option: str, value: str, phrase: str, capsys: pytest.CaptureFixture[str]
):
    assert run(["models", "plan", model, option, value]) == 2
    assert phrase.lower() in capsys.readouterr().err.lower()


def test_more_sessions_than_a_shard_takes_are_refused(
    model: str, capsys: pytest.CaptureFixture[str]
):
    assert run(["models", "plan", model, "--sessions", "5000"]) == 2
    assert "max_sessions is 5000" in capsys.readouterr().err


def test_a_model_that_is_nowhere_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["models", "plan", str(tmp_path)]) == 4
    assert run(["models", "plan", "nobody/no-model"]) == 4
    assert capsys.readouterr().err.count("error: no model") == 2


@pytest.mark.timeout(120)
def test_nothing_but_the_config_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = shrink(PUBLISHED["Qwen3-1.7B"].config)
    (tmp_path / "config.json").write_text(json.dumps(config))

    assert run(["models", "plan", str(tmp_path), "--sessions", "1", "--json"]) == 0

    document = json.loads(capsys.readouterr().out)
    assert document["embedding_bytes"] == 259 * 64 * 2
    assert document["total"]["layers"] == "0:3"
