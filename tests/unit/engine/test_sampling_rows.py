from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pals.engine.sampler import unpack_rows
from pals.engine.sampling_rows import (
    MAX_BIASES,
    RowSampling,
    build_sampling_rows,
    check_sampling,
    needs_slot,
)
from pals.errors import InvalidStep
from pals.types import Sampling

NAN, INFINITY = float("nan"), float("inf")
EXTREMES = [
    Sampling(temperature=0, top_k=0, top_p=1e-9, min_p=0, repetition_penalty=1e-9, seed=0),
    Sampling(temperature=2, top_k=1 << 18, top_p=1, min_p=1, repetition_penalty=2, logprobs=0),
    Sampling(presence_penalty=-2, frequency_penalty=2, seed=(1 << 64) - 1, logprobs=20),
    Sampling(logit_bias=tuple((token, -100.0) for token in range(MAX_BIASES))),
]


def test_rows_hold_every_value_and_padding_is_greedy() -> None:
    sampling = Sampling(
        temperature=0.5, top_k=7, top_p=0.25, min_p=0.125, repetition_penalty=1.5,
        presence_penalty=-0.5, frequency_penalty=0.75, seed=(3 << 32) + 5, logprobs=4,
    )  # fmt: skip

    rows = unpack_rows(build_sampling_rows([None, RowSampling(sampling, slot=9)], 3))

    assert [np.asarray(values).tolist() for values in rows] == [
        [0, 0.5, 0],
        [1, 0.25, 1],
        [0, 0.125, 0],
        [1, 1.5, 1],
        [0, -0.5, 0],
        [0, 0.75, 0],
        [0, 7, 0],
        [[0, 0], [3, 5], [0, 0]],
        [0, 9, 0],
        [False, True, False],
        [0, 5, 0],
    ]


def test_a_draft_is_not_counted_by_its_step() -> None:
    draft = RowSampling(Sampling(temperature=1.0), slot=2).as_draft()

    rows = unpack_rows(build_sampling_rows([draft], 1))

    assert (np.asarray(rows.is_counted).tolist(), np.asarray(rows.slots).tolist()) == ([False], [2])
    assert draft.sampling == Sampling(temperature=1.0)


def test_no_logprobs_differ_from_logprobs_of_no_alternatives() -> None:
    samplings = [RowSampling(Sampling(logprobs=wanted)) for wanted in (None, 0, 1)]

    assert np.asarray(unpack_rows(build_sampling_rows(samplings, 3)).wanted).tolist() == [0, 1, 2]


def test_more_samplings_than_rows_are_refused() -> None:
    with pytest.raises(InvalidStep, match="2 samplings for 1 rows"):
        build_sampling_rows([None, None], 1)


@pytest.mark.parametrize("sampling", EXTREMES)
def test_the_ends_of_the_ranges_are_taken(sampling: Sampling) -> None:
    assert build_sampling_rows([RowSampling(sampling)], 1).shape == (1, 12)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", (-0.1, 2.1, NAN, INFINITY)),
        ("top_p", (0.0, -0.5, 1.1, NAN, INFINITY)),
        ("min_p", (-0.1, 1.1, NAN)),
        ("top_k", (-1, (1 << 18) + 1)),
        ("repetition_penalty", (0.0, -1.0, 2.1, NAN, INFINITY)),
        ("presence_penalty", (-2.1, 2.1, NAN, -INFINITY)),
        ("frequency_penalty", (-2.1, 2.1, NAN, INFINITY)),
        ("seed", (-1, 1 << 64)),
        ("logprobs", (-1, 21)),
    ],
)
def test_values_out_of_range_are_refused_by_name_and_value(
    name: str, values: tuple[float, ...]
) -> None:
    for value in values:
        with pytest.raises(InvalidStep) as refused:
            RowSampling(replace(Sampling(), **{name: value}))
        assert f"{name} {value}" in str(refused.value)


@pytest.mark.parametrize(
    "biases",
    [
        ((5, 100.1),),
        ((5, -INFINITY),),
        ((5, NAN),),
        ((-1, 1.0),),
        ((50, 1.0),),
        ((5, 1.0), (5, 1.0)),
        tuple((token, 1.0) for token in range(MAX_BIASES + 1)),
    ],
)
def test_biases_out_of_range_are_refused(biases: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(InvalidStep, match="logit_bias"):
        check_sampling(Sampling(logit_bias=biases), vocab_size=50)


def test_top_k_ends_at_the_vocabulary() -> None:
    check_sampling(Sampling(top_k=50), vocab_size=50)
    with pytest.raises(InvalidStep, match="top_k 51"):
        check_sampling(Sampling(top_k=51), vocab_size=50)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(repetition_penalty=0.9),
        Sampling(presence_penalty=-1.0),
        Sampling(frequency_penalty=0.1),
        Sampling(logit_bias=((3, 0.0),)),
    ],
)
def test_penalties_and_biases_need_a_slot(sampling: Sampling) -> None:
    assert needs_slot(sampling)


def test_filters_need_no_slot() -> None:
    assert not needs_slot(Sampling(temperature=1, top_k=3, top_p=0.5, min_p=0.1, logprobs=3))
