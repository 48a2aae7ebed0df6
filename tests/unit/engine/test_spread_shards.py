"""A shard over several devices gives what it gives on one, and each device has its part."""

import json
import subprocess
import sys

import pytest

from tests.unit.engine.spread_shards import MODULES

pytestmark = pytest.mark.timeout(300)

ATOL = 1e-4
RTOL = 1e-6
QUANTISED_ATOL = 0.05


def run_child(group, folder, timeout_s):
    """Return what four virtual devices computed, in a process that may have them."""
    script = [sys.executable, "-W", "error", "-m", "tests.unit.engine.spread_shards", group]
    done = subprocess.run(
        [*script, str(folder)], capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return run_child("quick", tmp_path_factory.mktemp("models"), 280)


def assert_same(case, atol=ATOL):
    one, spread = case["ids"]
    assert spread == one
    assert case["difference"] <= atol


def test_devices_that_share_a_model_answer_as_one_does(quick):
    assert_same(quick["dense-2"])
    assert len(set(quick["dense-2"]["ids"][0])) > 3


@pytest.mark.parametrize("case", ["dense-4", "sparse-4"])
def test_hidden_states_of_four_devices_are_those_of_one(quick, case):
    assert 0 < quick[case]["difference"] <= RTOL


def test_each_device_has_its_heads_columns_and_words(quick):
    shares = quick["dense-2"]["shares"]

    divided = {"q_proj", "k_proj", "o_proj", "gate_proj", "down_proj", "embed_tokens", "cache"}
    assert {shares[name] for name in divided} == {0.5}
    assert {shares[name] for name in ("input_layernorm", "norm")} == {1.0}


def test_devices_with_one_key_head_for_two_of_them_have_one_each(quick):
    shares = quick["dense-4"]["shares"]

    assert [shares[name] for name in ("q_proj", "k_proj", "cache")] == [0.25, 1.0, 0.5]


def test_each_device_has_its_experts_and_a_vocabulary_that_does_not_divide(quick):
    shares = quick["sparse-4"]["shares"]

    assert [shares[name] for name in ("gate_up_proj", "gate", "embed_tokens")] == [0.25, 1.0, 1.0]


def test_sessions_that_fork_and_give_way_on_two_devices_get_what_they_get_alone(quick):
    answers, expected = quick["schedule"]["answers"]

    assert answers == expected
    assert quick["schedule"]["preempted"] > 0
    assert quick["schedule"]["copied"] > 0


def test_nothing_is_compiled_on_two_devices_after_warmup(quick):
    assert quick["schedule"]["compilations"] == 0


def test_what_does_not_divide_is_refused_with_the_reason_and_a_way_on(quick):
    heads, devices, blocks = quick["refused"]

    assert heads[:2] == ["CannotDivide", "6 attention heads cannot be divided among 4 devices"]
    assert heads[2] == "choose `--devices` so that it divides 6"
    assert devices[:2] == [
        "TooFewDevices",
        "5 devices are asked for, and there are 4 of kind `cpu` here",
    ]
    assert "columns that int8 rotates together cannot be divided among 4 devices" in blocks[1]


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    return run_child("families", tmp_path_factory.mktemp("families"), 880)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", MODULES)
def test_every_family_answers_on_several_devices_as_on_one(families, family):
    for devices in (2, 4):
        assert_same(families[f"{family}-{devices}"])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", MODULES)
def test_plan_counts_what_each_device_holds(families, family):
    plan = families[f"{family}-plan"]

    assert plan["planned"] == plan["held"]
    assert plan["on_first"] == sum(plan["held"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_quantised_matrices_are_divided_and_kept_whole(tmp_path):
    cases = run_child("quantised", tmp_path, 880)

    assert len(cases) == 2 * 2 * 2
    for case in cases.values():
        assert_same(case, atol=QUANTISED_ATOL)
