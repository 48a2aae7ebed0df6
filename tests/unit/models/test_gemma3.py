"""Where Gemma 3's checkpoints keep the text model."""

import pytest

from pals.models.configs import read_config
from pals.models.gemma3 import FAMILY
from pals.models.weights import name_problems, parameter_pieces
from pals.types import LayerRange
from tests.unit.models.configs.test_gemma3 import GEMMA_1B, GEMMA_27B

TOWERS = {
    "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
    "multi_modal_projector.mm_input_projection_weight",
}
NORM = ("layers", 1, "input_layernorm", "weight")
HEAD = ("lm_head", "weight")


@pytest.mark.parametrize(
    ("values", "model", "head", "beside"),
    [
        (GEMMA_1B, "model.", "lm_head.", set()),
        (GEMMA_27B, "language_model.model.", "language_model.lm_head.", TOWERS),
        (GEMMA_27B, "model.language_model.", "lm_head.", {f"model.{name}" for name in TOWERS}),
    ],
)
def test_text_is_found_in_every_spelling_and_images_are_left_alone(values, model, head, beside):
    config = read_config({**values, "tie_word_embeddings": False})
    layers = LayerRange(3, config.num_layers)
    norm, matrix = f"{model}layers.4.input_layernorm.weight", f"{head}weight"
    present = {norm, matrix, f"{model}embed_tokens.weight", *beside}

    sources = [
        piece.source
        for path in (NORM, HEAD)
        for piece in parameter_pieces(path, (8,), config, layers, FAMILY.weights, present)
    ]

    assert sources == [norm, matrix]
    assert name_problems(present, set(sources), config, layers, FAMILY.weights) == []


def test_tensors_that_belong_nowhere_are_refused():
    config = read_config(GEMMA_27B)
    layers = LayerRange(0, 1)
    present = {"language_model.model.layers.0.mlp.up_proj.weight", "audio_tower.conv.weight"}

    problems = name_problems(present, set(), config, layers, FAMILY.weights)

    assert problems == [
        "`audio_tower.conv.weight` is unexpected",
        "`language_model.model.layers.0.mlp.up_proj.weight` is unexpected",
    ]
