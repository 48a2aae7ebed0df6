from functools import partial

import jax
import ml_dtypes
import numpy as np
import pytest

from pals.config import CACHE_DIR_VARIABLE
from pals.engine.shard import Shard
from pals.errors import InvalidConfig, InvalidStep, LayersOutsideModel
from pals.models.snapshot import Snapshot
from pals.types import EngineLimits, LayerRange, Sampling
from tests.checkpoints import make_llama_checkpoint
from tests.unit.engine.chains import (
    LIMITS,
    counting_compilations,
    decode,
    generate,
    load_chain,
    prefill,
)

PROMPT = [256, *b"The quick brown fox jumps over the lazy dog, twice."]
OTHER = [256, *b"A shorter one."]
HOT = Sampling(temperature=1.2, top_p=0.9, seed=11)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory, shared_cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_DIR_VARIABLE, str(shared_cache))
        folder = make_llama_checkpoint(tmp_path_factory.mktemp("model"), num_layers=3)
        yield Snapshot.open(folder, "test/model")


@pytest.fixture(scope="module")
def whole(snapshot, shared_cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_DIR_VARIABLE, str(shared_cache))
        yield load_chain(snapshot, [0])


@pytest.fixture(scope="module")
def answer(whole):
    return generate(whole, PROMPT)


def test_answers_are_not_trivial(whole, answer):
    assert len(set(answer)) > 4
    assert generate(whole, OTHER) != answer


@pytest.mark.parametrize("cuts", [[0, 1], [0, 2], [0, 1, 2]])
def test_any_split_gives_the_same_tokens(snapshot, answer, cuts):
    assert generate(load_chain(snapshot, cuts), PROMPT) == answer


@pytest.mark.parametrize("chunk", [1, 5, 16, 31])
def test_any_chunking_gives_the_same_tokens(whole, answer, chunk):
    assert generate(whole, PROMPT, chunk=chunk) == answer


def test_any_slot_gives_the_same_tokens_after_another_session(whole, answer):
    for slot in range(LIMITS.max_sessions):
        generate(whole, OTHER * 4, slot=slot, count=4)
        assert generate(whole, PROMPT, slot=slot) == answer


@pytest.mark.parametrize("sampling", [Sampling(), HOT])
def test_batch_gives_the_same_tokens_as_each_session_alone(whole, sampling):
    prompts = {2: PROMPT, 0: OTHER, 1: PROMPT[:9]}
    alone = {
        slot: generate(whole, prompt, slot=slot, sampling=sampling)
        for slot, prompt in prompts.items()
    }

    together = {
        slot: [prefill(whole, slot, prompt, sampling=sampling)] for slot, prompt in prompts.items()
    }
    for step in range(11):
        slots = list(prompts)
        positions = [len(prompts[slot]) + step for slot in slots]
        latest = [together[slot][-1] for slot in slots]
        for slot, token in zip(
            slots, decode(whole, slots, positions, latest, [sampling] * 3), strict=True
        ):
            together[slot].append(token)

    assert together == alone


def test_replay_after_a_step_back_gives_the_same_tokens(whole, answer):
    generate(whole, PROMPT)

    position = len(PROMPT) - 3
    assert prefill(whole, 0, PROMPT[position:], position=position) == answer[0]


def test_answer_crosses_from_the_short_context_to_the_whole(snapshot, whole):
    prompt = (PROMPT * 6)[:250]
    split = load_chain(snapshot, [0, 1])

    assert generate(whole, prompt, count=40) == generate(split, prompt, count=40, chunk=16)


def test_chunk_that_ends_with_the_context_is_whole(snapshot, whole):
    """The padding of the last chunk must not push it back over earlier positions."""
    prompt = (PROMPT * 6)[: LIMITS.max_context_tokens]
    tokens = {prefill(whole, 0, prompt, chunk=chunk) for chunk in (32, 30, 17, 1)}

    assert len(tokens) == 1


def test_poison_of_one_session_does_not_reach_the_next(snapshot):
    head, tail = load_chain(snapshot, [0, 2])
    expected = generate([head, tail], OTHER)
    poison = np.full((32, 64), np.inf, np.float32)
    for position in range(0, 96, 32):
        tail.prefill(slot=0, position=position, inputs=poison, sampling=None)

    assert generate([head, tail], OTHER) == expected


def test_poison_in_a_batch_does_not_reach_the_other_rows(snapshot):
    tail = load_chain(snapshot, [0, 2])[1]
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    greedy = [Sampling()] * 3
    steps = {"slots": [0, 1, 2], "positions": [0, 0, 0], "samplings": greedy}
    expected = tail.decode(**steps, inputs=x)
    x[1] = np.nan

    found = tail.decode(**steps, inputs=x)

    assert found[[0, 2]].tolist() == expected[[0, 2]].tolist()


def test_nothing_is_compiled_after_warmup(snapshot):
    chain = load_chain(snapshot, [0, 2])
    for shard in chain:
        shard.warmup()

    with counting_compilations() as compilations:
        prompts = [(PROMPT * 6)[:length] for length in (1, 15, 33, 260)]
        for prompt in prompts:
            generate(chain, prompt, chunk=32, count=3)
            generate(chain, prompt, chunk=7, count=3, sampling=HOT)
        for batch in (1, 2, 3):
            for slot in range(batch):
                prefill(chain, slot, prompts[slot + 1])
            positions = [len(prompts[slot + 1]) for slot in range(batch)]
            decode(chain, range(batch), positions, [1] * batch, [HOT] * batch)

    assert compilations == []


def test_compilations_are_counted(snapshot):
    chain = load_chain(snapshot, [0])

    with counting_compilations() as compilations:
        prefill(chain, 0, OTHER)

    assert len(compilations) == 1


def test_warmup_tells_each_program_once(snapshot):
    shard = load_chain(snapshot, [0, 2])[0]

    names = [program.name for program in shard.warmup()]

    assert names == [
        "prefill_16x256", "prefill_16x316", "prefill_32x256", "prefill_32x316",
        "decode_1x256", "decode_1x316", "decode_2x256", "decode_2x316",
        "decode_4x256", "decode_4x316",
    ]  # fmt: skip


def test_warmup_runs_what_sessions_begin_with_and_leaves_no_session(snapshot, monkeypatch):
    shard = load_chain(snapshot, [0, 2])[1]
    run, names = shard._run, []

    def note(key, *arguments):
        names.append(str(key))
        return run(key, *arguments)

    monkeypatch.setattr(shard, "_run", note)
    shard.warmup()

    assert names == [
        "prefill_16x256", "prefill_32x256", "decode_1x256", "decode_2x256", "decode_4x256"
    ]  # fmt: skip
    hidden = np.zeros((1, 64), np.float32)
    with pytest.raises(InvalidStep, match="which holds 0"):
        shard.decode(slots=[0], positions=[1], inputs=hidden, samplings=[Sampling()])


def test_compiled_programs_are_kept_on_disk(snapshot, tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path))

    prefill(load_chain(snapshot, [0]), 0, OTHER)

    assert any((tmp_path / "xla").iterdir())


@pytest.mark.parametrize(("dtype", "wire"), [("f32", np.float32), ("bf16", ml_dtypes.bfloat16)])
def test_hidden_states_travel_in_the_compute_dtype(snapshot, dtype, wire):
    head, tail = load_chain(snapshot, [0, 1], dtype)

    hidden = head.prefill(slot=0, position=0, inputs=np.array(OTHER, np.int32), sampling=None)
    token = tail.prefill(slot=0, position=0, inputs=hidden, sampling=Sampling())

    assert (hidden.dtype, hidden.shape) == (wire, (len(OTHER), 64))
    assert (token.dtype, token.shape) == (np.int32, (1,))


def test_bf16_is_near_f32(snapshot):
    inputs = np.array(OTHER, np.int32)
    wide, narrow = (
        load_chain(snapshot, [0, 1], dtype)[0]
        .prefill(slot=0, position=0, inputs=inputs, sampling=None)
        .astype(np.float32)
        for dtype in ("f32", "bf16")
    )

    assert np.square(wide - narrow).mean() < 0.02**2 * np.square(wide).mean()


def test_memory_is_what_the_arrays_take(snapshot):
    shard = load_chain(snapshot, [0, 1], "bf16")[0]

    use = shard.memory_bytes()

    layer = 64 * (64 * 2 + 32 * 2) + 3 * 64 * 96 + 2 * 64
    assert use.weights == 2 * (259 * 64 + layer)
    assert use.kv == 2 * 2 * 3 * 2 * 316 * 16


@pytest.mark.parametrize(
    "change",
    [
        {"slot": -1},
        {"slot": 3},
        {"position": -1},
        {"position": 1},
        {"inputs": np.zeros(0, np.int32)},
        {"inputs": np.zeros(33, np.int32)},
        {"inputs": np.zeros((), np.int32)},
        {"inputs": np.zeros(4, np.int64)},
        {"inputs": np.zeros((4, 64), np.float32)},
        {"inputs": np.array([259], np.int32)},
        {"inputs": np.array([-1], np.int32)},
        {"sampling": Sampling(temperature=9.0)},
    ],
)
def test_prefill_out_of_range_is_refused(snapshot, change):
    shard = load_chain(snapshot, [0])[0]
    step = {"slot": 0, "position": 0, "inputs": np.zeros(4, np.int32), "sampling": None}

    with pytest.raises(InvalidStep):
        shard.prefill(**(step | change))


@pytest.mark.parametrize(
    "inputs",
    [
        np.zeros(4, np.int32),
        np.zeros((4, 64), ml_dtypes.bfloat16),
        np.zeros((4, 63), np.float32),
        np.zeros((4, 64, 1), np.float32),
    ],
)
def test_hidden_states_of_another_kind_are_refused(snapshot, inputs):
    tail = load_chain(snapshot, [0, 1])[1]

    with pytest.raises(InvalidStep):
        tail.prefill(slot=0, position=0, inputs=inputs, sampling=None)


@pytest.mark.parametrize(
    "change",
    [
        {"slots": [0, 0]},
        {"slots": [0, 3]},
        {"slots": [0]},
        {"positions": [4]},
        {"positions": [4, 5]},
        {"positions": [4, -1]},
        {"samplings": [Sampling()]},
        {"inputs": np.zeros(4, np.int32)},
        {"inputs": np.array([0, 259], np.int32)},
    ],
)
def test_decode_out_of_range_is_refused(whole, change):
    step = {
        "slots": [0, 1],
        "positions": [4, 4],
        "inputs": np.zeros(2, np.int32),
        "samplings": [Sampling()] * 2,
    }
    for slot in (0, 1):
        prefill(whole, slot, [1, 2, 3, 4])

    with pytest.raises(InvalidStep):
        whole[0].decode(**(step | change))


def test_session_cannot_read_past_what_it_wrote(whole):
    """Beyond lie the tokens of the slot's former session."""
    prefill(whole, 0, PROMPT)
    prefill(whole, 0, OTHER)

    with pytest.raises(InvalidStep):
        decode(whole, [0], [len(PROMPT)], [1])


def test_context_cannot_be_left(whole):
    prompt = (PROMPT * 6)[: LIMITS.max_context_tokens]
    prefill(whole, 0, prompt)

    with pytest.raises(InvalidStep):
        decode(whole, [0], [len(prompt)], [1])


def test_layers_outside_the_model_are_refused(snapshot):
    with pytest.raises(LayersOutsideModel):
        Shard.load(snapshot, LayerRange(2, 4), dtype="f32", limits=LIMITS)


@pytest.mark.parametrize(
    "limits",
    [
        EngineLimits(max_sessions=0),
        EngineLimits(max_sessions=257),
        EngineLimits(max_context_tokens=0),
        EngineLimits(max_context_tokens=4097),
        EngineLimits(max_chunk_tokens=8),
        EngineLimits(max_chunk_tokens=100),
        EngineLimits(max_chunk_tokens=8192),
    ],
)
def test_limits_out_of_range_are_refused(snapshot, limits):
    with pytest.raises(InvalidConfig):
        Shard.load(snapshot, LayerRange(0, 1), dtype="f32", limits=limits)


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_step_that_fails_empties_every_slot_and_the_next_session_runs(snapshot, kind, monkeypatch):
    shards = load_chain(snapshot, [0])
    expected = generate(shards, OTHER)
    prefill(shards, 1, OTHER)
    run_step = {
        "prefill": partial(prefill, shards, 0, OTHER),
        "decode": partial(decode, shards, [0], [len(OTHER)], [1]),
    }[kind]

    def fail(leaves, cache, *_):
        """Fail as XLA does: after the cache was given away."""
        for array in jax.tree.leaves(cache):
            array.delete()
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(shards[0]._programs, "get", lambda *_: fail)
        with pytest.raises(jax.errors.JaxRuntimeError):
            run_step()
    with pytest.raises(InvalidStep, match="which holds 0"):
        decode(shards, [1], [len(OTHER)], [1])

    assert generate(shards, OTHER) == expected
