from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.errors import InvalidActivation
from pals.net.activations import MAX_MAGNITUDE, are_sound, check_states
from pals.types import PeerId

PEER = PeerId("12D3KooWSender")
DTYPES = pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])


def states(dtype: type, *, element: float = 1.0) -> np.ndarray:
    """Return two tokens of ordinary states, one element of the second set otherwise."""
    made = np.linspace(-3.0, 3.0, 128, dtype=np.float32).reshape(2, 64)
    made[1, 17] = element
    return made.astype(dtype)


@DTYPES
@pytest.mark.parametrize(
    ("element", "problem"),
    [
        (float("nan"), "NaN"),
        (-float("nan"), "NaN"),
        (float("inf"), "infinity"),
        (-float("inf"), "infinity"),
        (2 * MAX_MAGNITUDE, "norm is 2.15e"),
        (-2 * MAX_MAGNITUDE, "norm is 2.15e"),
        (3e38, "norm is"),
    ],
)
def test_one_element_that_no_model_makes_is_refused_with_the_sender(
    dtype: type, element: float, problem: str
) -> None:
    with pytest.raises(InvalidActivation, match=problem) as caught:
        check_states(PEER, states(dtype, element=element), position=5)
    assert caught.value.fields["peer"] == PEER


@DTYPES
def test_zeros_are_refused_but_where_a_prompt_begins(dtype: type) -> None:
    zeros = np.zeros((2, 64), np.float32).astype(dtype)
    check_states(PEER, zeros, position=0)
    with pytest.raises(InvalidActivation, match="zero"):
        check_states(PEER, zeros, position=1)


@DTYPES
def test_negative_zeros_are_zeros(dtype: type) -> None:
    with pytest.raises(InvalidActivation, match="zero"):
        check_states(PEER, np.full((1, 8), -0.0, np.float32).astype(dtype), position=1)


@DTYPES
@given(scale=st.floats(-30, 6), seed=st.integers(0, 2**32 - 1))
def test_states_of_any_model_s_size_pass(dtype: type, scale: float, seed: int) -> None:
    drawn = np.random.default_rng(seed).standard_normal((3, 64), np.float32)
    check_states(PEER, (drawn * np.float32(10.0**scale)).astype(dtype), position=9)


@DTYPES
def test_greatest_states_that_are_known_of_models_pass(dtype: type) -> None:
    check_states(PEER, states(dtype, element=8e5), position=9)


@DTYPES
@given(
    element=st.sampled_from([1.0, -8e5, MAX_MAGNITUDE, 2 * MAX_MAGNITUDE, 3e38, float("nan"),
                             float("inf"), -float("inf"), 0.0]),
    is_rest_zero=st.booleans(),
)  # fmt: skip
def test_a_frame_is_sound_exactly_when_each_of_its_tokens_is(
    dtype: type, element: float, is_rest_zero: bool
) -> None:
    made = states(dtype, element=element)
    if is_rest_zero:
        made[1] = 0
        made[1, 17] = element
    try:
        for token in made:
            check_states(PEER, token[None], position=1)
    except InvalidActivation:
        assert not are_sound(made)
    else:
        assert are_sound(made)
