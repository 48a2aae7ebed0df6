"""Shards spread over virtual devices; a process of its own, for jax counts its devices once.

Prints, for each case that is named, how far it is from a shard on one device.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from pals.engine.batch import BatchRules
from pals.engine.cache import page_format
from pals.engine.plan import plan_model
from pals.engine.shard import Shard
from pals.engine.work import RowSampling
from pals.errors import PalsError
from pals.models.snapshot import Snapshot
from pals.types import EngineLimits, LayerRange, Quantization, Sampling, ShardSpec
from tests.checkpoints import make_llama_checkpoint, make_qwen3_moe_checkpoint
from tests.random_checkpoints import make_random_checkpoint
from tests.unit.engine.chains import counting_compilations, generate, make_row, make_step
from tests.unit.engine.schedules import Ask, Schedule
from tests.unit.models.tiny_configs import DENSE, OWN_KEYS

DEVICES = 4
F32 = np.dtype(np.float32)
PROMPT = [256, *b"Who sees all?"]
COUNT = 8
PAGES = 4
LIMITS = EngineLimits(
    max_sessions=3, max_rows=2, max_context_tokens=64, max_chunk_tokens=16, page_tokens=16
)
MODULES = [name for name in OWN_KEYS if name not in ("gemma3", "kimi_k2", "mistral")]
"""Families with modules of their own, or options that no other has."""
SIZES = {"num_layers": 2, "num_heads": 8, "head_dim": 64, "vocab_size": 260}
WIDE = SIZES | {"intermediate_size": 1024}
GROUPS = Quantization(group_size=32)


def open_model(folder, make, *arguments, **sizes):
    return Snapshot.open(make(folder, *arguments, **sizes), "test/model")


def load(snapshot, devices, dtype="f32", limits=LIMITS):
    layers = LayerRange(0, snapshot.config.num_layers)
    return Shard.load(
        snapshot, layers, dtype=dtype, limits=limits, devices=devices, quantization=GROUPS
    )


def answer(shard, tokens=()):
    """Return greedy tokens, and the log-probabilities of the 20 likeliest at each place.

    Args:
        shard: A whole model.
        tokens: What is answered whatever is likeliest, so that shards can be compared.
    """
    sampling = RowSampling(Sampling(logprobs=20))
    history, ids, scores = list(PROMPT), [], []
    for number in range(COUNT):
        kind, position = ("decode", len(history) - 1) if number else ("prefill", 0)
        row = make_row(shard, 0, kind, position, len(history) - position)
        step = make_step(shard, [row]) if number else make_step(shard, [], row)
        output = shard.run(step, [np.array(history[position:], np.int32)], [sampling])
        ids.append(int(output.sampled.ids[0]))
        scores.append(output.sampled.top_logprobs[0])
        history.append(tokens[number] if tokens else ids[-1])
    return ids, np.stack(scores)


def compare(snapshot, devices, dtype="f32"):
    """Return what devices that share a model answer, beside what one does that has it."""
    ids, scores = answer(load(snapshot, 1, dtype))
    shard = load(snapshot, devices, dtype)
    spread_ids, spread_scores = answer(shard, ids)
    return {
        "ids": [ids, spread_ids],
        "difference": float(np.abs(scores - spread_scores).max()),
        "shares": shares_of(shard),
    }


def shares_of(shard):
    """Return what part of the parameters of each name the first device has, and of the cache."""
    held = zip(shard._programs.parameters, shard._leaves, strict=True)
    shares = {
        str(path[-2]): leaf.addressable_shards[0].data.size / leaf.size for path, leaf in held
    }
    whole = page_format(shard.config, shard.layers, page_tokens=16, dtype=F32)
    return shares | {"cache": shard.page_format.token_bytes / whole.token_bytes}


def compare_hidden(snapshot, devices, layers):
    """Return how far the hidden states of first layers are from those of one device.

    As a part of the largest: nothing has normalised them.
    """
    hidden = []
    for count in (1, devices):
        shard = Shard.load(snapshot, layers, dtype="f32", limits=LIMITS, devices=count)
        prompt = make_row(shard, 0, "prefill", 0, len(PROMPT))
        after = make_row(shard, 0, "decode", len(PROMPT), 1)
        steps = [(make_step(shard, [], prompt), PROMPT), (make_step(shard, [after]), [7])]
        outputs = [shard.run(step, [np.array(ids, np.int32)], [None]) for step, ids in steps]
        hidden.append(np.concatenate([output.hidden for output in outputs]))
    difference = np.abs(hidden[0] - hidden[1]).max() / np.abs(hidden[0]).max()
    return {"difference": float(difference), "shares": shares_of(shard)}


def run_schedule(snapshot, devices):
    """Return whether sessions that fork and give way get what they get alone, on one device."""
    alone = load(snapshot, 1)
    limits = replace(LIMITS, kv_bytes=(1 + PAGES) * load(snapshot, devices).page_format.page_bytes)
    shard = load(snapshot, devices, limits=limits)
    shard.warmup()
    asks = [Ask(prompt=[n, *PROMPT], count=30, arrives=n) for n in range(3)]
    asks[0].forks = [Ask(prompt=asks[0].prompt, count=5)]
    everybody = [*asks, *asks[0].forks]
    expected = [generate([alone], ask.prompt, count=ask.count) for ask in everybody]
    schedule = Schedule(shard, BatchRules(admission_wait_s=100.0, decoding_s=0.001))
    with counting_compilations() as compilations:
        schedule.run(asks)
    return {
        "answers": [[ask.tokens for ask in everybody], expected],
        "preempted": sum(ask.preemptions for ask in everybody),
        "copied": sum(len(step.copies) for step in schedule.steps),
        "compilations": len(compilations),
    }


def plan(snapshot, devices, layers):
    """Return what the plan says of a part of a model, and what it takes, on each device."""
    spec = ShardSpec(dtype="f32", limits=LIMITS, devices=devices)
    planned = plan_model(snapshot.config, spec).plan_range(layers)
    shard = Shard.load(snapshot, layers, dtype="f32", limits=LIMITS, devices=devices)
    held = shard.memory_bytes()
    on_first = [
        array.addressable_shards[0].data.nbytes
        for array in jax.tree.leaves((shard._leaves, shard._cache))
    ]
    return {
        "planned": [planned.weights, planned.kv],
        "held": [held.weights, held.kv],
        "on_first": sum(on_first),
    }


def refuse(snapshot, devices, dtype="f32"):
    try:
        load(snapshot, devices, dtype)
    except PalsError as error:
        return [type(error).__name__, str(error), error.hint]


def quick(folder):
    dense = open_model(folder / "dense", make_llama_checkpoint, **SIZES)
    sparse = open_model(folder / "sparse", make_qwen3_moe_checkpoint, num_experts=8)
    odd = open_model(folder / "odd", make_llama_checkpoint, num_layers=1, num_heads=6, head_dim=16)
    return {
        "schedule": run_schedule(dense, 2),
        "dense-2": compare(dense, 2),
        "dense-4": compare_hidden(dense, 4, LayerRange(0, 1)),
        "sparse-4": compare_hidden(sparse, 4, LayerRange(0, 1)),
        "refused": [refuse(odd, 4), refuse(dense, 5), refuse(dense, 4, "int8")],
    }


def families(folder):
    """Return one entry for each family of models on two and on four devices."""
    results = {}
    for family in MODULES:
        config = DENSE | OWN_KEYS[family] | {"model_type": family, "vocab_size": 260}
        model = open_model(folder / family, make_random_checkpoint, config)
        results |= {f"{family}-{devices}": compare(model, devices) for devices in (2, 4)}
        results |= {f"{family}-plan": plan(model, 4, LayerRange(1, 3))}
    return results


def quantised(folder):
    """Return one entry for each way to quantise; the second comes from what the first kept."""
    dense = open_model(folder / "dense", make_llama_checkpoint, **WIDE)
    wide = {"head_dim": 64, "intermediate_size": 256, "vocab_size": 260}
    config = DENSE | OWN_KEYS["qwen3_moe"] | {"model_type": "qwen3_moe"} | wide
    sparse = open_model(folder / "sparse", make_random_checkpoint, config)
    models = {"dense-4": (dense, 4), "sparse-2": (sparse, 2)}
    return {
        f"{name}-{dtype}-{number}": compare(model, devices, dtype)
        for name, (model, devices) in models.items()
        for dtype in ("int8", "int4")
        for number in range(2)
    }


def main():
    jax.config.update("jax_num_cpu_devices", DEVICES)
    groups = {"quick": quick, "families": families, "quantised": quantised}
    results = groups[sys.argv[1]](Path(sys.argv[2]))
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
