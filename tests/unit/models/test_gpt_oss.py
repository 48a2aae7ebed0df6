"""Where gpt-oss keeps its experts: the file's layouts become the one that is computed with."""

import numpy as np
import pytest

from pals.models.gpt_oss import FAMILY

EXPERTS, HIDDEN, INTERMEDIATE = 2, 3, 4
GATES_THEN_UPS = [0, 2, 4, 6, 1, 3, 5, 7]


def draw(*shape):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def assemble(parameter, shape, name, stored):
    """Build a parameter from one tensor, as a loader does."""
    target = np.full(shape, np.nan, np.float32)
    for piece in FAMILY.weights.layer_pieces(parameter, "layer.", shape, {f"layer.{name}"}):
        assert piece.source == f"layer.{name}"
        assert piece.shape == stored.shape
        target[piece.index][piece.rows] = piece.change(stored[piece.entry])
    return target


@pytest.fixture
def gate_up():
    """Return matrices [E, 2 F, D], whose rows are gate and up in turn."""
    return draw(EXPERTS, 2 * INTERMEDIATE, HIDDEN)


def test_gates_come_before_ups_of_published_matrices(gate_up):
    found = assemble(
        "mlp.experts.gate_up_proj.weight",
        gate_up.shape,
        "mlp.experts.gate_up_proj_blocks",
        gate_up,
    )

    np.testing.assert_array_equal(found, gate_up[:, GATES_THEN_UPS])


def test_gates_come_before_ups_of_matrices_that_transformers_saved(gate_up):
    found = assemble(
        "mlp.experts.gate_up_proj.weight",
        gate_up.shape,
        "mlp.experts.gate_up_proj",
        gate_up.swapaxes(1, 2),
    )

    np.testing.assert_array_equal(found, gate_up[:, GATES_THEN_UPS])


def test_gates_come_before_ups_of_biases():
    bias = draw(EXPERTS, 2 * INTERMEDIATE)

    found = assemble(
        "mlp.experts.gate_up_proj.bias", bias.shape, "mlp.experts.gate_up_proj_bias", bias
    )

    np.testing.assert_array_equal(found, bias[:, GATES_THEN_UPS])


@pytest.mark.parametrize(
    ("name", "axes"),
    [("mlp.experts.down_proj_blocks", (0, 1, 2)), ("mlp.experts.down_proj", (0, 2, 1))],
)
def test_down_projections_are_held_as_out_by_in(name, axes):
    down = draw(EXPERTS, HIDDEN, INTERMEDIATE)

    found = assemble("mlp.experts.down_proj.weight", down.shape, name, down.transpose(axes))

    np.testing.assert_array_equal(found, down)
