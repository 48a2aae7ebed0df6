from array import array
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest

from pals.config import CACHE_DIR_VARIABLE
from pals.engine.buckets import BatchLimits
from pals.engine.pages import PageCopy
from pals.engine.shard import Shard
from pals.engine.work import RowSampling
from pals.errors import InvalidConfig, InvalidStep, LayersOutsideModel
from pals.models.snapshot import Snapshot
from pals.types import EngineLimits, LayerRange, Sampling
from tests.checkpoints import make_llama_checkpoint
from tests.unit.engine.chains import (
    LIMITS,
    counting_compilations,
    decode,
    generate,
    hidden_states,
    load_chain,
    make_row,
    make_step,
    prefill,
    run_rows,
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


def test_answer_crosses_pages_and_blocks(snapshot, whole):
    prompt = (PROMPT * 6)[:250]
    split = load_chain(snapshot, [0, 1])

    assert generate(whole, prompt, count=40) == generate(split, prompt, count=40, chunk=16)


def test_chunk_that_ends_with_the_context_is_whole(snapshot, whole):
    """The padding of the last chunk must not push it back over earlier positions."""
    prompt = (PROMPT * 6)[: LIMITS.max_context_tokens]
    tokens = {prefill(whole, 0, prompt, chunk=chunk) for chunk in (32, 30, 17, 1)}

    assert len(tokens) == 1


def run_hidden(shard, rows, hidden, samplings):
    """Run rows (slot, kind, position, tokens) of hidden states at the tail."""
    made = [make_row(shard, *row) for row in rows]
    chunk = made.pop() if rows[-1][1] == "prefill" else None
    chosen = [None if sampling is None else RowSampling(sampling, 0) for sampling in samplings]
    return shard.run(make_step(shard, made, chunk), hidden, chosen).sampled


def test_poison_of_one_session_does_not_reach_the_next(snapshot):
    head, tail = load_chain(snapshot, [0, 2])
    expected = generate([head, tail], OTHER)
    poison = np.full((32, 64), np.inf, np.float32)
    for position in range(0, 96, 32):
        run_hidden(tail, [(0, "prefill", position, 32)], [poison], [None])

    assert generate([head, tail], OTHER) == expected


def test_poison_in_a_step_does_not_reach_the_other_rows(snapshot):
    tail = load_chain(snapshot, [0, 2])[1]
    x = list(np.random.default_rng(0).standard_normal((3, 1, 64)).astype(np.float32))
    x.append(np.random.default_rng(1).standard_normal((9, 64)).astype(np.float32))
    rows = [*((slot, "decode", 0, 1) for slot in range(3)), (3, "prefill", 0, 9)]
    expected = run_hidden(tail, rows, x, [Sampling()] * 4).ids
    x[1] = np.full_like(x[1], np.nan)

    found = run_hidden(tail, rows, x, [Sampling()] * 4).ids

    assert found[[0, 2, 3]].tolist() == expected[[0, 2, 3]].tolist()


def run_pooled(shard, rows, hidden, samplings):
    """Return what is pooled of a step at the tail; see `run_hidden`."""
    made = [make_row(shard, *row) for row in rows]
    chunk = made.pop() if rows[-1][1] == "prefill" else None
    chosen = [RowSampling(sampling) for sampling in samplings]
    return shard.run(make_step(shard, made, chunk), hidden, chosen).pooled


def test_only_the_chunk_of_a_step_is_pooled_and_its_padding_is_not(snapshot):
    tail = load_chain(snapshot, [0, 2])[1]
    pooling = Sampling(pooling=True)
    row = np.random.default_rng(0).standard_normal((1, 64)).astype(np.float32)
    chunk = np.random.default_rng(1).standard_normal((9, 64)).astype(np.float32)

    alone = run_pooled(tail, [(1, "prefill", 0, 9)], [chunk], [pooling])
    rows = [(0, "decode", 0, 1), (1, "prefill", 0, 9)]
    beside = run_pooled(tail, rows, [row, chunk], [Sampling(), pooling])
    first = run_pooled(tail, [(2, "prefill", 0, 4)], [chunk[:4]], [pooling])
    rest = run_pooled(tail, [(2, "prefill", 4, 5)], [chunk[4:]], [pooling])

    np.testing.assert_allclose(beside, alone, atol=1e-4)
    np.testing.assert_allclose(first + rest, alone, atol=1e-4)
    assert run_pooled(tail, [(0, "decode", 0, 1)], [row], [pooling]) is None
    assert run_pooled(tail, rows, [row, chunk], [pooling, Sampling()]) is None


def test_rows_drafts_and_chunks_of_one_step_are_as_each_alone(whole):
    rows = [
        (0, "decode", len(PROMPT), [7]),
        (2, "decode", len(OTHER), [9]),
        (1, "prefill", 0, PROMPT[:16]),
    ]

    def prepare():
        prefill(whole, 0, PROMPT)
        prefill(whole, 2, OTHER)

    prepare()
    alone = [run_rows(whole, [row], [Sampling()])[0] for row in rows]
    prepare()

    assert run_rows(whole, rows, [Sampling()] * 3) == alone


def test_drafts_are_verified_token_by_token_and_taken_back(whole, answer):
    prefill(whole, 0, PROMPT)
    draft = [answer[0], answer[1], 5, 6]

    (verified,) = run_rows(whole, [(0, "verify", len(PROMPT), draft)], [Sampling()])

    assert verified[:2] == answer[1:3]
    position = len(PROMPT) + 2
    assert decode(whole, [0], [position], [answer[2]]) == [answer[3]]


def test_copied_page_is_a_page_of_its_own(whole, answer):
    """As a fork has it: what one session writes to its copy is not seen by the other."""
    shard = whole[0]
    prefill(whole, 0, PROMPT)
    row = make_row(shard, 0, "decode", len(PROMPT), 1)
    copied = replace(row, pages=array("i", [1 + BatchLimits.of(LIMITS).max_pages]))
    copies = (PageCopy(row.pages[0], copied.pages[0]),)
    step = replace(make_step(shard, [copied]), copies=copies)
    greedy = [RowSampling(Sampling(), 0)]

    forked = shard.run(step, [np.array([3], np.int32)], greedy).sampled.ids
    own = shard.run(make_step(shard, [row]), [np.array(answer[:1], np.int32)], greedy).sampled.ids

    assert own.tolist() == answer[1:2]
    assert forked.tolist() == generate(whole, [*PROMPT, 3], count=1)


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

    assert len(compilations) >= 3  # embedding, layer, head; another shard may have the sampler


def test_warmup_tells_each_program_once_and_measures_it(snapshot):
    shard = load_chain(snapshot, [0, 2])[0]
    told = []

    programs = shard.warmup(told.append)

    assert told == programs
    assert [program.name for program in programs] == [
        "copy_16", *(str(program) for program in shard.programs)
    ]  # fmt: skip
    assert {program.program.kind for program in programs[1:]} == {
        "decode", "verify", "chunk", "mixed"
    }  # fmt: skip
    assert all(program.run_s > 0 for program in programs[1:])


def test_compiled_programs_are_kept_on_disk(snapshot, tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path))

    prefill(load_chain(snapshot, [0]), 0, OTHER)

    assert any((tmp_path / "xla").iterdir())


@pytest.mark.parametrize(("dtype", "wire"), [("f32", np.float32), ("bf16", ml_dtypes.bfloat16)])
def test_hidden_states_travel_in_the_compute_dtype(snapshot, dtype, wire):
    head, tail = load_chain(snapshot, [0, 1], dtype)

    hidden = hidden_states(head, OTHER)
    sampled = run_hidden(tail, [(0, "prefill", 0, len(OTHER))], [hidden], [Sampling()])

    assert (hidden.dtype, hidden.shape) == (wire, (len(OTHER), 64))
    assert (sampled.ids.dtype, sampled.ids.shape) == (np.int32, (1,))


def test_bf16_is_near_f32(snapshot):
    wide, narrow = (
        hidden_states(load_chain(snapshot, [0, 1], dtype)[0], OTHER).astype(np.float32)
        for dtype in ("f32", "bf16")
    )

    assert np.square(wide - narrow).mean() < 0.02**2 * np.square(wide).mean()


def test_memory_is_what_the_arrays_take(snapshot):
    shard = load_chain(snapshot, [0, 1], "bf16")[0]

    use = shard.memory_bytes()

    layer = 64 * (64 * 2 + 32 * 2) + 3 * 64 * 96 + 2 * 64
    assert use.weights == 2 * (259 * 64 + layer)
    pages = 1 + LIMITS.max_sessions * BatchLimits.of(LIMITS).max_pages
    assert use.kv == shard.kv_bytes == pages * 64 * 2 * 2 * 2 * 16


def test_cache_has_the_bytes_that_are_named(snapshot):
    page = 64 * 2 * 4 * 2 * 16
    limits = replace(LIMITS, kv_bytes=7 * page + 5)

    shard = load_chain(snapshot, [0, 1], limits=limits)[0]

    assert shard.memory_bytes().kv == 7 * page
    assert shard.make_batcher(bytes(32)).free_tokens == 6 * 64


@pytest.mark.parametrize(
    "inputs",
    [
        np.zeros(0, np.int32),
        np.zeros((), np.int32),
        np.zeros(4, np.int64),
        np.zeros((4, 64), np.float32),
        np.array([259], np.int32),
        np.array([-1], np.int32),
    ],
)
def test_token_ids_of_another_kind_are_refused(whole, inputs):
    with pytest.raises(InvalidStep):
        whole[0].check_inputs(inputs)


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
        tail.check_inputs(inputs)


def test_layers_outside_the_model_are_refused(snapshot):
    with pytest.raises(LayersOutsideModel):
        Shard.load(snapshot, LayerRange(2, 4), dtype="f32", limits=LIMITS)


@pytest.mark.parametrize(
    "limits",
    [
        EngineLimits(max_sessions=0),
        EngineLimits(max_sessions=4097),
        EngineLimits(max_context_tokens=0),
        EngineLimits(max_context_tokens=4097),
        EngineLimits(max_chunk_tokens=8),
        EngineLimits(max_chunk_tokens=100),
        EngineLimits(max_chunk_tokens=8192),
        EngineLimits(max_rows=0),
        EngineLimits(prefill_share=1.0),
        EngineLimits(page_tokens=48),
    ],
)
def test_limits_out_of_range_are_refused(snapshot, limits):
    with pytest.raises(InvalidConfig):
        Shard.load(snapshot, LayerRange(0, 1), dtype="f32", limits=limits)


def test_shard_whose_step_failed_runs_on_after_a_reset(snapshot, monkeypatch):
    shards = load_chain(snapshot, [0])
    expected = generate(shards, OTHER)

    def fail(arguments):
        """Fail as XLA does: after the cache was given away."""
        for leaf in jax.tree.leaves(arguments.cache):
            leaf.delete()
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(shards[0]._programs, "get", lambda _: fail)
        with pytest.raises(jax.errors.JaxRuntimeError):
            prefill(shards, 0, OTHER)
    shards[0].reset()

    assert generate(shards, OTHER) == expected
