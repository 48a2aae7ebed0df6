"""What the benchmarks of the engine print and write, on made-up samples."""

from __future__ import annotations

import itertools
import math

import pytest
from gguf import GGUFReader

from benchmarks import batching, engine, moe, random_models, resident, rivals
from benchmarks.engine_rules import RULES, summarise_rule
from benchmarks.llama_cpp import BatchedLine, BenchLine, find_llama_cpp, read_lines
from benchmarks.moe_child import Took
from benchmarks.random_models import LLAMA_8B, QWEN3_600M, SMOLLM2_135M, Shape
from benchmarks.results import Result, Subject
from benchmarks.rules_child import PROGRAMS
from benchmarks.streams import Prompts

PALS = Subject(benchmark="any", system="pals", setting={"threads": 2}, load=0.5)
TINY = Shape(
    name="tiny",
    family="qwen3",
    num_layers=2,
    hidden_size=64,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=128,
    tied=True,
)


def ratios(results: list[Result], *keys: str) -> dict[tuple[object, ...], float]:
    """Return the comparisons by metric, other side and some of their settings."""
    return {
        (r.metric, r.setting["to"], *[r.setting.get(key) for key in keys]): r.value
        for r in results
        if r.unit == "ratio"
    }


# --- engine --------------------------------------------------------------------------


def test_decode_and_prefill_are_compared_with_each_system_and_with_memory():
    rates = {
        "pals": [{1: 10.0, 8: 40.0, 0: 500.0}] * 3,
        "torch": [{1: 5.0, 8: 80.0, 0: 250.0}] * 3,
    }

    results = list(engine.summarise(PALS, rates, [200.0] * 3, weight_bytes=10))

    assert ratios(results, "sessions", "prompt_tokens") == {
        ("decode_ratio", "torch", 1, None): 2.0,
        ("decode_ratio", "torch", 8, None): 0.5,
        ("prefill_ratio", "torch", None, 512): 2.0,
        ("bandwidth_ratio", "read bandwidth", 1, None): 0.5,
        ("bandwidth_ratio", "read bandwidth", 8, None): 0.25,
    }
    assert {r.system for r in results if r.metric == "decode_tokens_per_s"} == {"pals", "torch"}


def test_each_way_of_a_rule_is_a_program():
    ways = itertools.chain.from_iterable((rule.way, rule.other) for rule in RULES)
    assert {way.program for way in ways} == set(PROGRAMS)


def test_a_rule_is_worth_as_much_as_it_is_faster():
    step, ratio = summarise_rule(PALS, RULES[0], [(0.001, 0.01), (0.002, 0.01)])
    assert (step.metric, step.value) == ("step_ms", 1.5)
    assert (ratio.min, ratio.max, ratio.setting["to"]) == (5.0, 10.0, "one row")


# --- experts -------------------------------------------------------------------------


def test_experts_are_compared_with_memory_and_with_the_other_way():
    def took(seconds: float) -> list[Took]:
        return [Took(seconds=seconds, workspace_bytes=9, active_bytes=100)] * 2

    samples = {"pals": took(0.5), "sorted blocks": took(1.0)}
    results = list(moe.summarise(PALS, 8, [400.0] * 2, samples))

    assert ratios(results) == {
        ("bandwidth_ratio", "read bandwidth"): 0.5,
        ("throughput_ratio", "sorted blocks"): 2.0,
    }
    assert [r.value for r in results if r.metric == "workspace_bytes"] == [9, 9]


# --- batching and memory -------------------------------------------------------------


def test_many_sessions_are_compared_with_one_and_with_the_rival_of_as_many():
    samples = batching.Samples(
        totals={1: [10.0], 8: [50.0]},
        rival_totals={1: [20.0], 8: [25.0]},
        rates_before=[40.0],
        rates_beside=[30.0],
        alone_s=[4.0],
        beside_s=[16.0],
        first_s=[2.0],
        again_s=[0.2],
    )

    results = list(batching.summarise(PALS, samples, batching.FULL))

    assert ratios(results, "sessions") == {
        ("total_tokens_ratio", "1 session", 8): 5.0,
        ("total_tokens_ratio", "llama.cpp RPC", 1): 0.5,
        ("total_tokens_ratio", "llama.cpp RPC", 8): 2.0,
        ("decode_ratio", "before the prompt", 5): 0.75,
        ("time_to_first_token_ratio", "the first time", 1): 0.1,
    }


def test_without_the_rival_there_are_no_lines_of_it():
    samples = batching.Samples(totals={1: [10.0]}, **{name: [1.0] for name in LISTS})
    results = list(batching.summarise(PALS, samples, batching.FULL))
    assert {r.system for r in results} == {"pals"}


LISTS = ("rates_before", "rates_beside", "alone_s", "beside_s", "first_s", "again_s")


def test_prompts_are_all_different_and_the_same_in_every_run():
    first, second = Prompts(), Prompts()
    drawn = [first.draw(4) for _ in range(3)]
    assert drawn == [second.draw(4) for _ in range(3)]
    assert len({prompt[0] for prompt in drawn}) == 3


def test_memory_is_compared_with_the_first_reading_of_the_same_shard():
    results = list(resident.summarise(PALS, [[100, 10], [150, 10], [200, 11]]))
    assert [r.value for r in results if r.metric == "resident_bytes"] == [150, 10]
    [ratio] = [r for r in results if r.unit == "ratio"]
    assert (ratio.min, ratio.max, ratio.setting["to"]) == (1.1, 2.0, "after 1 of 3 parts")


# --- rivals --------------------------------------------------------------------------


def test_what_llama_cpp_prints_is_read_between_its_other_lines():
    batched = 'loading\n{"pp": 32, "pl": 4, "speed_tg": 12.5, "n_kv": 9}\n\ndone\n'
    assert read_lines(batched, BatchedLine) == [BatchedLine(pl=4, speed_tg=12.5)]
    bench = '{"n_prompt": 512, "n_gen": 0, "avg_ts": 300.25}\n'
    assert read_lines(bench, BenchLine) == [BenchLine(n_prompt=512, n_gen=0, avg_ts=300.25)]


def test_a_rival_that_is_not_built_is_said_to_be_missing(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("benchmarks.llama_cpp.FOLDER", tmp_path)
    assert find_llama_cpp(threads=1) is None
    assert "llama.cpp is missing: `make rivals` builds it" in capsys.readouterr().err


def test_progresspals_is_measured_by_the_python_that_has_it(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    python = tmp_path / "python"
    monkeypatch.setattr(rivals, "PROGRESSPALS", python)
    monkeypatch.setattr(rivals, "SMOLLM2_135M", TINY)
    monkeypatch.setattr(random_models, "FOLDER", tmp_path)
    assert rivals.measure_progresspals(2) is None
    assert "ProgressPals is missing" in capsys.readouterr().err

    python.write_text('#!/bin/sh\n[ "$4 $5 $6" = "3 32 3" ] && echo "[1.0, 4.0, 6.0]"\n')
    python.chmod(0o755)
    result = rivals.measure_progresspals(2)
    assert result is not None
    assert (result.system, result.value, result.n) == ("ProgressPals", 5.0, 2)


def test_servers_are_compared_with_one_process():
    samples = rivals.Samples(prefill=[300.0], alone=[{1: 20.0}], split=[{1: 15.0}])
    results = list(rivals.summarise("BF16", samples, load=0.5))
    assert ratios(results) == {("total_tokens_ratio", "one process"): 0.75}
    assert {r.system for r in results} == {"llama.cpp", "llama.cpp RPC"}


# --- random models -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "billions"), [(LLAMA_8B, 0.876), (QWEN3_600M, 0.596), (SMOLLM2_135M, 0.1345)]
)
def test_shapes_have_as_many_parameters_as_the_published_models(shape: Shape, billions: float):
    parameters = sum(math.prod(tensor.sizes) for tensor in shape.tensors())
    assert parameters / 1e9 == pytest.approx(billions, rel=0.002)


def test_a_checkpoint_and_its_gguf_have_the_same_tensors(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(random_models, "FOLDER", tmp_path)
    snapshot = random_models.open_checkpoint(TINY)
    gguf = GGUFReader(random_models.open_gguf(TINY, "Q8_0"))

    held = {tensor.name: tuple(reversed(tensor.shape.tolist())) for tensor in gguf.tensors}
    assert held == {f"{tensor.gguf_name}.weight": tensor.sizes for tensor in TINY.tensors()}
    names = set(snapshot.weights().file_of)
    assert names == {f"{tensor.checkpoint_name}.weight" for tensor in TINY.tensors()}
