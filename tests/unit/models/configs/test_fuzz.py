"""Published configs with some values replaced by anything that JSON can say."""

import copy
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.errors import CorruptModel, UnsupportedModel
from pals.models.configs import FAMILIES, read_config
from pals.models.rope import attention_factor, inverse_frequencies
from tests.published_configs import PUBLISHED
from tests.work import measuring_work

# of which the longest list of layers takes half
MOST_LINES = 100_000
MOST_BYTES = 1 << 20

EDGES = st.sampled_from(
    [
        *[0, 1, -1, 2, 3, 7, 1 << 16, 1 << 20, 1 << 22, 1 << 40, 1 << 63, 10**300],
        *[0.0, 0.5, 1.0, 1.5, -0.5, 1e-300, 1e-20, 1e17, 1e300, float("inf"), float("nan")],
        *["", "8", "default", "linear", "yarn", "sliding_attention", "awq", "fp8"],
        *[True, False, None, [], {}, [128, 128]],
    ]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | EDGES
JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=8,
)


def places(values, prefix=()):
    """Return the path of every value of a config, those of its tables too."""
    found = []
    for key, value in values.items():
        found.append((*prefix, key))
        if isinstance(value, dict):
            found += places(value, (*prefix, key))
    return found


@st.composite
def mutated(draw, model_type):
    values = copy.deepcopy(PUBLISHED[model_type])
    chosen = draw(st.lists(st.sampled_from(places(values)), min_size=1, max_size=4, unique=True))
    for *tables, key in chosen:
        table = values
        for name in tables:
            table = table.get(name) if isinstance(table, dict) else None
        if isinstance(table, dict):
            table[key] = draw(EDGES | JSON)
    return values


def test_every_family_has_a_published_config():
    assert PUBLISHED.keys() >= FAMILIES.keys()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_published_config_is_read(model_type):
    assert read_config(PUBLISHED[model_type]).num_layers > 1


@pytest.mark.parametrize("model_type", FAMILIES)
def test_changed_config_is_refused_or_makes_sense(model_type):
    @settings(max_examples=200)
    @given(mutated(model_type))
    def check(values):
        with measuring_work() as work:
            config, problem = read(values)
        assert work.lines < MOST_LINES
        assert work.peak_bytes < MOST_BYTES
        assert len(problem) < 2000
        if config is not None:
            check_sense(config)

    check()


def read(values):
    try:
        return read_config(values), ""
    except (CorruptModel, UnsupportedModel) as error:
        return None, str(error)


def check_sense(config):
    """Compute what a shard computes from a config before it reads any weight."""
    assert config.parameter_count > 0
    assert len(config.cache_shapes(config.num_layers - 1)) in (1, 2)
    for rope in config.rope:
        frequencies = inverse_frequencies(rope)
        assert np.isfinite(frequencies).all()
        assert np.isfinite(np.float32(attention_factor(rope)))
    assert json.dumps(list(config.eos_token_ids))
