from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.engine.bank import (
    Bank,
    build_bank,
    count_tokens,
    pack_bits,
    reset_slot,
    set_allowed,
)
from pals.engine.drawing import pick_likeliest
from pals.engine.sampler import Sampled, sample, score_tokens
from pals.engine.sampling_rows import RowSampling, build_sampling_rows, needs_slot
from pals.types import Sampling
from tests.unit.engine import sampling_reference as reference
from tests.unit.engine.chains import counting_compilations

VOCAB, SLOTS, SIZE, MANY = 300, 12, 11, 1000
sample_compiled = jax.jit(lambda *arguments: sample(*arguments))
HOT = Sampling(temperature=2.0)


def draw_logits(rows: int, seed: int = 0) -> np.ndarray:
    return 3 * np.random.default_rng(seed).standard_normal((rows, VOCAB)).astype(np.float32)


def run(
    logits: np.ndarray,
    samplings: Sequence[Sampling | RowSampling | None],
    positions: Sequence[int] = (),
    bank: Bank | None = None,
) -> tuple[Sampled, Bank]:
    """Sample one token a row, by a program of 1, `SIZE` or `MANY` rows; the others only pad."""
    rows = [RowSampling(s) if isinstance(s, Sampling) else s for s in samplings]
    count = len(logits)
    size = next(size for size in (1, SIZE, MANY) if size >= count)
    sampled, bank = sample_compiled(
        np.pad(logits, [(0, size - count), (0, 0)]),
        build_sampling_rows(rows, size),
        np.resize(np.array(positions or [0], np.int32), size),
        build_bank(logits.shape[1], SLOTS) if bank is None else bank,
    )
    return Sampled(*[np.asarray(array)[:count] for array in sampled]), bank


def choose(*arguments: object) -> list[int]:
    return run(*arguments)[0].ids.tolist()


def test_greedy_rows_take_the_likeliest_token_and_tell_nothing_else() -> None:
    logits = draw_logits(4)

    sampled, bank = run(logits, [Sampling()] * 3)

    assert sampled.ids.tolist() == logits.argmax(-1).tolist()
    assert not sampled.logprobs.any()
    assert (sampled.top_ids == -1).all()
    assert not sampled.top_logprobs.any()
    assert not np.asarray(bank.counts).any()


def test_of_equal_logits_greedy_takes_the_lowest_token() -> None:
    logits = np.zeros((2, VOCAB), np.float32)
    logits[1, [7, 9]] = 1

    assert choose(logits, [Sampling(), Sampling()]) == [0, 7]


def test_logits_that_are_not_numbers_still_give_a_token() -> None:
    assert np.asarray(pick_likeliest(np.full((1, VOCAB), np.nan, np.float32))) < VOCAB


def test_token_depends_on_seed_and_position_only() -> None:
    logits = np.repeat(draw_logits(1), 4, axis=0)
    hot = [replace(HOT, seed=seed) for seed in (1, 1, 2, 1)]
    tokens = np.array([choose(logits, hot, [p, p, p, p + 1]) for p in range(20)])

    assert (tokens[:, 0] == tokens[:, 1]).all()
    assert (tokens[:, 0] != tokens[:, 2]).any()
    assert (tokens[1:, 0] == tokens[:-1, 3]).all()
    assert len(set(tokens[:, 0])) > 3


def test_halves_of_a_large_seed_both_count() -> None:
    logits = np.repeat(draw_logits(1), 3, axis=0)
    hot = [replace(HOT, seed=seed) for seed in (7, 7 + (1 << 32), (1 << 64) - 1)]
    tokens = np.array([choose(logits, hot, [p] * 3) for p in range(20)])

    assert (tokens[:, 0] != tokens[:, 1]).any()
    assert (tokens[:, 0] != tokens[:, 2]).any()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_frequencies_follow_the_softmax_at_the_temperature(temperature: float) -> None:
    logits = draw_logits(1)
    samplings = [Sampling(temperature=temperature, seed=seed) for seed in range(MANY)]

    tokens = choose(np.repeat(logits, MANY, axis=0), samplings)

    expected = np.exp(reference.log_softmax(logits[0] / temperature))
    found = np.bincount(tokens, minlength=VOCAB) / MANY
    np.testing.assert_allclose(found, expected, atol=4 * np.sqrt(0.25 / MANY))
    assert abs(found - expected).sum() < 0.5


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 9e-6])
def test_temperatures_next_to_zero_are_greedy(temperature: float) -> None:
    logits = draw_logits(2)

    assert choose(logits, [Sampling(temperature=temperature)] * 2) == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=2, top_k=1), Sampling(temperature=2, top_p=1e-9),
     Sampling(temperature=2, min_p=1), Sampling(temperature=1e-5)],
)  # fmt: skip
def test_filters_to_one_token_are_greedy(sampling: Sampling) -> None:
    logits = draw_logits(8)

    assert choose(logits, [replace(sampling, seed=s) for s in range(8)]) == (
        logits.argmax(-1).tolist()
    )


def test_logprobs_are_those_of_the_model_before_bias_and_temperature() -> None:
    logits = draw_logits(4)
    sampling = Sampling(temperature=0.5, logit_bias=((5, 100.0),), logprobs=3)
    bank = reset_slot(build_bank(VOCAB, SLOTS), 1, sampling)

    sampled, _ = run(
        logits,
        [Sampling(logprobs=20), RowSampling(sampling, slot=1), Sampling(), Sampling(logprobs=0)],
        bank=bank,
    )

    expected = [reference.log_softmax(row) for row in logits]
    own = [expected[row][sampled.ids[row]] for row in (0, 1, 3)]
    assert sampled.ids[1] == 5
    np.testing.assert_allclose(sampled.logprobs[[0, 1, 3]], own, atol=1e-4)
    assert sampled.logprobs[2] == 0
    for row, names in enumerate((20, 3, 0, 0)):
        order = np.argsort(-logits[row], kind="stable")[:names]
        assert sampled.top_ids[row].tolist() == [*order, *[-1] * (20 - names)]
        np.testing.assert_allclose(
            sampled.top_logprobs[row], [*expected[row][order], *[0] * (20 - names)], atol=1e-4
        )


def test_a_vocabulary_of_few_tokens_names_all_of_them() -> None:
    logits = np.array([[0.0, 3.0, 1.0]], np.float32)

    sampled = jax.jit(score_tokens)(logits, np.array([1], np.int32), np.array([21], np.int32))

    assert np.asarray(sampled.top_ids)[0].tolist() == [1, 2, 0, *[-1] * 17]


def test_a_large_vocabulary_is_searched_in_blocks() -> None:
    logits = draw_logits(VOCAB // 3).reshape(2, -1)[:, :15_000]
    samplings = [Sampling(temperature=1, top_k=40, seed=4, logprobs=20), Sampling(temperature=1)]

    sampled, _ = run(logits, samplings)

    assert sampled.top_ids[0].tolist() == np.argsort(-logits[0])[:20].tolist()
    assert sampled.ids[0] in np.argsort(-logits[0])[:40]


PENALISED = Sampling(repetition_penalty=1.7, presence_penalty=1.5, frequency_penalty=0.8)
PROMPT, ANSWER = [3, 3, 250], [3, 9, 9, 9, 40]


@pytest.mark.parametrize(
    "sampling",
    [
        replace(PENALISED, logit_bias=((3, 4.0), (77, -9.0))),
        Sampling(repetition_penalty=0.5),
        Sampling(presence_penalty=-2.0),
        Sampling(frequency_penalty=2.0),
        Sampling(logit_bias=((77, 100.0),)),
    ],
)
@pytest.mark.parametrize("has_mask", [True, False])
def test_penalties_change_the_draw_as_the_reference_does(
    sampling: Sampling, has_mask: bool
) -> None:
    logits = draw_logits(1)
    allowed = np.random.default_rng(5).random(VOCAB) < 0.5 if has_mask else np.ones(VOCAB, bool)
    bank = reset_slot(build_bank(VOCAB, SLOTS), 5, sampling, prompt=PROMPT, answer=ANSWER)
    bank = set_allowed(bank, 5, pack_bits(allowed)) if has_mask else bank
    changed = reference.penalise(logits[0], sampling, PROMPT, ANSWER, allowed)

    # the same noise over logits that were changed beforehand: the tokens must agree
    hot = [replace(sampling, temperature=1.5, seed=seed) for seed in range(MANY)]
    found = choose(
        np.repeat(logits, MANY, axis=0),
        [RowSampling(s, slot=5, is_counted=False) for s in hot],
        [0],
        bank,
    )
    expected = choose(
        np.repeat(changed[None].astype(np.float32), MANY, axis=0),
        [Sampling(temperature=1.5, seed=seed) for seed in range(MANY)],
    )

    assert np.mean(np.array(found) == np.array(expected)) > 0.995
    assert allowed[found].all()
    assert len(set(found)) > 3 or sampling.logit_bias == ((77, 100.0),)


def test_greedy_rows_obey_penalties_too() -> None:
    logits = draw_logits(1)
    best, second = np.argsort(-logits[0])[:2]
    bias = Sampling(logit_bias=((int(best), -100.0),))
    bank = reset_slot(build_bank(VOCAB, SLOTS), 1, bias)

    assert choose(logits, [RowSampling(bias, slot=1)], [0], bank) == [second]


@pytest.mark.parametrize("repetition", [1e-30, 1e-3, 2.0])
def test_extreme_penalties_leave_numbers(repetition: float) -> None:
    sampling = Sampling(temperature=1e-5, repetition_penalty=repetition, frequency_penalty=2.0)
    bank = reset_slot(
        build_bank(VOCAB, SLOTS), 1, sampling, prompt=range(VOCAB), answer=np.zeros(10**5, int)
    )
    logits = 1e4 * draw_logits(1)

    token = choose(logits, [RowSampling(sampling, slot=1)], [0], bank)[0]

    x = reference.penalise(logits[0], replace(sampling, repetition_penalty=max(repetition, 1e-5)),
                           range(VOCAB), [0] * (1 << 15))  # fmt: skip
    assert token == x.argmax()


def test_each_step_counts_its_own_tokens_as_a_replay_would() -> None:
    sampling = Sampling(temperature=1.0, frequency_penalty=2.0, presence_penalty=1.0, seed=8)
    logits = draw_logits(1, seed=3) / 4
    bank = reset_slot(build_bank(VOCAB, SLOTS), 2, sampling)
    answer: list[int] = []
    for position in range(30):
        sampled, bank = run(logits, [RowSampling(sampling, slot=2)], [position], bank)
        answer.append(int(sampled.ids[0]))
    counted = np.asarray(bank.counts)[2]

    replayed = reset_slot(build_bank(VOCAB, SLOTS), 7, sampling, answer=answer[:20])
    again: list[int] = []
    for position in range(20, 30):
        sampled, replayed = run(logits, [RowSampling(sampling, slot=7)], [position], replayed)
        again.append(int(sampled.ids[0]))

    assert again == answer[20:]
    assert counted.tolist() == np.bincount(answer, minlength=VOCAB).tolist()
    assert np.asarray(replayed.counts)[7].tolist() == counted.tolist()


def test_drafts_see_the_counts_of_their_start_and_count_once_accepted() -> None:
    sampling = replace(PENALISED, temperature=1.0, seed=3)
    logits = draw_logits(4)
    bank = reset_slot(build_bank(VOCAB, SLOTS), 1, sampling, answer=ANSWER)
    before = np.asarray(bank.counts)[1].tolist()
    row = RowSampling(sampling, slot=1)
    alone = [choose(logits[i : i + 1], [row], [40 + i], bank)[0] for i in range(4)]

    sampled, bank = run(logits, [row.as_draft()] * 4, [40, 41, 42, 43], bank)
    untouched = np.asarray(bank.counts)[1].tolist()
    bank = count_tokens(bank, [1, 1], sampled.ids[:2].tolist())

    assert sampled.ids.tolist() == alone
    assert untouched == before
    expected = np.bincount([*ANSWER, *alone[:2]], minlength=VOCAB)
    assert np.asarray(bank.counts)[1].tolist() == expected.tolist()


@dataclass(frozen=True)
class Case:
    """One row of a batch and what its session had before."""

    sampling: Sampling
    logits_seed: int
    position: int
    prompt: list[int]
    answer: list[int]
    mask_seed: int | None

    @property
    def has_slot(self) -> bool:
        return needs_slot(self.sampling) or self.mask_seed is not None

    @property
    def logits(self) -> np.ndarray:
        return draw_logits(1, self.logits_seed)

    @property
    def allowed(self) -> np.ndarray | None:
        if self.mask_seed is None:
            return None
        mask = np.random.default_rng(self.mask_seed).random(VOCAB) < 0.1
        mask[self.mask_seed] = True
        return mask

    def fill(self, bank: Bank, slot: int) -> Bank:
        bank = reset_slot(bank, slot, self.sampling, prompt=self.prompt, answer=self.answer)
        return bank if self.allowed is None else set_allowed(bank, slot, pack_bits(self.allowed))


tokens = st.integers(0, VOCAB - 1)
some_tokens = st.lists(tokens, max_size=12)
cases = st.builds(
    Case,
    sampling=st.builds(
        Sampling,
        temperature=st.sampled_from([0.0, 0.0, 0.2, 1.0, 2.0]),
        top_k=st.sampled_from([0, 0, 1, 3, 100, 128, 200, VOCAB]),
        top_p=st.sampled_from([1.0, 1.0, 0.05, 0.6, 0.99]),
        min_p=st.sampled_from([0.0, 0.0, 0.01, 0.3, 1.0]),
        repetition_penalty=st.sampled_from([1.0, 1.0, 0.5, 1.3, 2.0]),
        presence_penalty=st.sampled_from([0.0, 0.0, -2.0, 1.1]),
        frequency_penalty=st.sampled_from([0.0, 0.0, -1.2, 2.0]),
        logit_bias=st.one_of(
            st.just(()),
            st.dictionaries(tokens, st.floats(-100, 100, width=32), max_size=5).map(
                lambda biases: tuple(biases.items())
            ),
        ),
        seed=st.integers(0, (1 << 64) - 1),
        logprobs=st.sampled_from([None, None, 0, 5, 20]),
    ),
    logits_seed=st.integers(0, 20),
    position=st.integers(0, 131_071),
    prompt=some_tokens,
    answer=some_tokens,
    mask_seed=st.one_of(st.none(), tokens),
)


def run_together(batch: list[Case]) -> tuple[list[list[object]], Bank]:
    """Return what each row gets, and the bank after it."""
    bank, logits = build_bank(VOCAB, SLOTS), np.zeros((SIZE, VOCAB), np.float32)
    rows: list[RowSampling] = []
    for place, case in enumerate(batch):
        slot = place + 1 if case.has_slot else 0
        bank = case.fill(bank, slot) if slot else bank
        rows.append(RowSampling(case.sampling, slot=slot))
        logits[place] = case.logits[0]
    positions = [*[case.position for case in batch], *[0] * (SIZE - len(batch))]
    sampled, bank = run(logits, rows, positions, bank)
    return [[array[row].tolist() for array in sampled] for row in range(len(batch))], bank


def run_alone(case: Case) -> list[object]:
    bank = build_bank(VOCAB, SLOTS)
    bank = case.fill(bank, 4) if case.has_slot else bank
    row = RowSampling(case.sampling, slot=4 if case.has_slot else 0)
    sampled, _ = run(case.logits, [row], [case.position], bank)
    return [array[0].tolist() for array in sampled]


@settings(max_examples=50)
@given(st.lists(cases, min_size=1, max_size=SIZE), st.randoms(use_true_random=False))
def test_rows_obey_their_own_filters_whatever_stands_beside_them(
    batch: list[Case], random: Random
) -> None:
    order = list(range(len(batch)))
    random.shuffle(order)

    found, bank = run_together(batch)
    shuffled, _ = run_together([batch[place] for place in order])

    assert [found[place] for place in order] == shuffled
    counts = np.asarray(bank.counts)
    for place, case in enumerate(batch):
        assert_obeys(case, found[place])
        answer = [*case.answer, found[place][0]] if case.has_slot else []
        assert counts[place + 1].tolist() == np.bincount(answer, minlength=VOCAB).tolist()
    assert not counts[0].any()
    assert not counts[len(batch) + 1 :].any()


@settings(max_examples=50)
@given(st.lists(cases, min_size=1, max_size=SIZE))
def test_a_row_gets_alone_what_it_gets_in_a_batch(batch: list[Case]) -> None:
    found, _ = run_together(batch)

    assert found == [run_alone(case) for case in batch]


def assert_obeys(case: Case, found: list[object]) -> None:
    """Check the token and the log-probability of one row against numpy."""
    token, logprob, top, _ = found
    sampling = case.sampling
    changed = reference.penalise(
        case.logits[0], sampling, case.prompt, case.answer, case.allowed
    ) if case.has_slot else case.logits[0].astype(np.float64)  # fmt: skip
    assert np.isfinite(changed[token])
    if not sampling.temperature:
        assert changed[token] >= changed.max() - 1e-3
    else:
        scaled = changed / sampling.temperature
        assert scaled[token] >= reference.find_least_kept(scaled, sampling) - 1e-3
    if sampling.logprobs is not None:
        assert abs(logprob - reference.log_softmax(case.logits[0])[token]) < 1e-3
        order = np.argsort(-case.logits[0], kind="stable")
        assert top[: sampling.logprobs] == order[: sampling.logprobs].tolist()


def test_any_mix_of_rows_runs_in_one_program() -> None:
    bank, logits = build_bank(VOCAB, SLOTS), draw_logits(SIZE)
    bank = reset_slot(bank, 1, PENALISED)
    batches = [
        [],
        [Sampling()],
        [replace(HOT, top_k=200, logprobs=20), RowSampling(PENALISED, slot=1)],
        [replace(HOT, top_p=0.3), replace(HOT, min_p=0.2), None, HOT],
    ]
    _, bank = run(logits, [], [0], bank)

    with counting_compilations() as compiled:
        for samplings in batches:
            _, bank = run(logits, samplings, [9], bank)

    assert not compiled
