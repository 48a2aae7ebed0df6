"""The memory plan: right about loaded shards, and about models that nothing here could load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.engine.plan import HEADROOM, EndsPlan, LayerPlan, ModelPlan, plan_model
from pals.engine.shard import Shard
from pals.models.configs import FAMILIES, read_config
from pals.models.snapshot import Snapshot
from pals.types import Dtype, EngineLimits, LayerRange, ShardSpec
from tests.checkpoints import make_llama_checkpoint
from tests.demo_model import import_demo_model
from tests.random_checkpoints import make_random_checkpoint
from tests.unit.models.published import PUBLISHED, shrink

LIMITS = EngineLimits(max_sessions=2, max_rows=4, max_context_tokens=240, max_chunk_tokens=32)
FEW_PROGRAMS = EngineLimits(
    max_sessions=1, max_rows=2, max_context_tokens=240, max_chunk_tokens=16, verify_tokens=1
)
TOLERANCE = 0.05
MOST_RESIDENT_BYTES = 2 << 30

KNOWN = {name: one for name, one in PUBLISHED.items() if one.config["model_type"] in FAMILIES}
SLOW = {"Qwen3-4B", "Qwen3-8B", "Qwen3-14B", "Llama-3.1-70B", "Qwen2.5-7B", "Mistral-7B-v0.3"}
QUICK_FAMILIES = {"llama", "qwen3_moe"}
SMALLEST = {one.config["model_type"]: one for one in reversed(KNOWN.values())}


def device_bytes(shard: Shard) -> int:
    """Return what a warmed-up shard takes on its device."""
    workspace = max(program.workspace_bytes for program in shard.warmup())
    memory = shard.memory_bytes()
    return memory.weights + memory.kv + memory.bank + workspace


def assert_plan_is_right(
    folder: Path, layers: LayerRange, dtype: Dtype, limits: EngineLimits = LIMITS
) -> None:
    snapshot = Snapshot.open(folder, "test/model")
    planned = plan_model(snapshot.config, ShardSpec(dtype=dtype, limits=limits)).plan_range(layers)

    shard = Shard.load(snapshot, layers, dtype=dtype, limits=limits)

    memory = shard.memory_bytes()
    held = (memory.weights, memory.kv, memory.bank)
    assert (planned.weights, planned.kv, planned.bank) == held
    assert planned.device == pytest.approx(device_bytes(shard), rel=TOLERANCE)


# --- against shards ------------------------------------------------------------------


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK_FAMILIES))
        for name in SMALLEST
    ],
)
def test_plan_of_a_family_is_right_to_5_percent(family: str, tmp_path: Path):
    folder = make_random_checkpoint(tmp_path / "model", shrink(SMALLEST[family].config))

    assert_plan_is_right(folder, LayerRange(0, 3), "bf16", FEW_PROGRAMS)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("layers", "dtype"),
    [
        ("1:3", "f32"),
        ("1:3", "int8"),
        *(
            pytest.param(*part, marks=pytest.mark.slow)
            for part in [("0:2", "bf16"), ("2:4", "bf16"), ("2:3", "int4")]
        ),
    ],
)
def test_plan_of_a_part_is_right_to_5_percent(layers: str, dtype: Dtype, tmp_path: Path):
    folder = make_llama_checkpoint(tmp_path / "model", num_layers=4)

    assert_plan_is_right(folder, LayerRange.parse(layers), dtype)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("layers", ["0:30", "10:20"])
def test_plan_of_the_real_model_is_right_to_5_percent(layers: str, shared_cache: Path):
    folder = import_demo_model(shared_cache)

    assert_plan_is_right(folder, LayerRange.parse(layers), "bf16")


_SERVE = """
import re, sys
from pathlib import Path
import pals.net.node, pals.net.serving
from pals.engine.plan import plan_model
from pals.engine.shard import Shard
from pals.models.snapshot import Snapshot
from pals.types import EngineLimits, LayerRange, ShardSpec, Sampling
from tests.unit.engine.chains import decode, prefill

snapshot = Snapshot.open(Path(sys.argv[1]), "test/model")
limits = EngineLimits(max_sessions=4, max_rows=4, max_context_tokens=1024, max_chunk_tokens=128)
layers = LayerRange(0, snapshot.config.num_layers)
shard = Shard.load(snapshot, layers, dtype="bf16", limits=limits)
shard.warmup()
sampling = Sampling(temperature=1.0, top_p=0.9)
slots = range(limits.max_sessions)
most = limits.max_context_tokens - 1
for slot in slots:
    prefill([shard], slot, [5] * most, chunk=limits.max_chunk_tokens, sampling=sampling)
decode([shard], slots, [most] * len(slots), [5] * len(slots), [sampling] * len(slots))
resident = int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
plan = plan_model(snapshot.config, ShardSpec(limits=limits)).plan_range(layers)
print(resident, plan.device, plan.runtime)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("model", ["real", "random"])
def test_a_serving_process_stays_within_its_plan(model: str, tmp_path: Path, shared_cache: Path):
    folder = (
        import_demo_model(shared_cache)
        if model == "real"
        else make_llama_checkpoint(
            tmp_path / "model", num_layers=4, hidden_size=1024, intermediate_size=4096
        )
    )

    done = subprocess.run(
        [sys.executable, "-c", _SERVE, str(folder)], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    resident, device, runtime = map(int, done.stdout.split())
    assert resident <= (device + runtime) * HEADROOM
    assert resident > device


# --- against what is published -------------------------------------------------------


def test_the_family_of_every_model_that_the_product_names_is_known():
    assert KNOWN.keys() == PUBLISHED.keys()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in KNOWN]
)
def test_a_published_model_is_planned_and_its_layers_compile_without_weights(name: str):
    model = KNOWN[name]
    config = read_config(model.config)

    plan = plan_model(config, ShardSpec(limits=EngineLimits()))

    assert plan.num_layers == model.layers
    assert plan.whole.weights == pytest.approx(2 * model.parameters, rel=1e-3)
    assert all(kind.workspace > 0 for kind in plan.kinds)


# The peak of the program's own memory: ru_maxrss would count the process that started it, too.
_PLAN = """
import re, sys
from pathlib import Path
from pals.cli.app import run

status = run(["models", "plan", sys.argv[1], "--json"])
print(status, re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_largest_model_is_planned_in_little_memory(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Llama-3.1-405B"].config))

    done = subprocess.run(
        [sys.executable, "-c", _PLAN, str(tmp_path)], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    document, last = done.stdout.splitlines()
    assert json.loads(document)["total"]["weight_bytes"] == 811_706_777_600
    status, kilobytes = map(int, last.split())
    assert status == 0
    assert kilobytes * 1024 < MOST_RESIDENT_BYTES


# --- arithmetic ----------------------------------------------------------------------


def made_plan(weights: list[int]) -> ModelPlan:
    """Return a plan of layers of these weights between heavy ends."""
    kinds = tuple(
        LayerPlan(layers=(layer,), weights=size << 20, kv_per_token=1 << 10, workspace=1 << 20)
        for layer, size in enumerate(weights)
    )
    ends = EndsPlan(
        embedding=300 << 20, head=301 << 20, both=302 << 20, sampling=1 << 20, bank=1 << 20
    )
    return ModelPlan(kinds=kinds, ends=ends, limits=EngineLimits(), num_programs=4)


sizes = st.lists(st.integers(1, 4000), min_size=1, max_size=12)


def test_a_shard_of_one_end_holds_its_weights_and_one_of_both_a_tied_embedding_once():
    plan = made_plan([10, 10, 10])

    mib = [plan.plan_range(LayerRange.parse(r)).weights >> 20 for r in ("0:1", "1:2", "2:3", "0:3")]

    assert mib == [310, 10, 311, 332]


def test_the_tail_alone_holds_the_bank_of_the_sampler():
    plan = made_plan([10, 10, 10])

    assert [plan.plan_range(LayerRange.parse(r)).bank for r in ("0:2", "2:3", "0:3")] == [
        0, 1 << 20, 1 << 20
    ]  # fmt: skip


@given(sizes, st.integers(0, 12 << 30))
def test_the_layers_that_fit_fit_and_one_more_does_not(weights: list[int], memory: int):
    plan = made_plan(weights)
    for start in range(plan.num_layers):
        count = plan.layers_that_fit(memory, start=start)
        stop = start + count
        if count:
            assert plan.plan_range(LayerRange(start, stop)).needed <= memory
        if stop < plan.num_layers:
            assert plan.plan_range(LayerRange(start, stop + 1)).needed > memory


@given(sizes, st.integers(0, 12 << 30))
def test_as_many_machines_as_are_needed_hold_all_layers_and_fewer_do_not(
    weights: list[int], memory: int
):
    plan = made_plan(weights)
    needed = plan.machines_needed(memory)
    if needed is None:
        smallest = [plan.plan_range(LayerRange(i, i + 1)).needed for i in range(plan.num_layers)]
        assert max(smallest) > memory
        return
    placed = plan.place([memory] * needed)
    assert [layer for r in placed if r for layer in range(r.start, r.stop)] == list(
        range(plan.num_layers)
    )
    fewer = plan.place([memory] * (needed - 1))
    assert sum(len(r) for r in fewer if r) < plan.num_layers
