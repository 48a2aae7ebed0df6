import pytest

from pals.models.parts import EMBEDDING, REST, is_needed, layer_of, part_of, parts_of
from pals.types import LayerRange


@pytest.mark.parametrize(
    ("tensor", "part"),
    [
        ("model.layers.0.mlp.up_proj.weight", "layer-00000"),
        ("model.layers.61.mlp.experts.7.up_proj.weight_scale_inv", "layer-00061"),
        ("language_model.model.layers.3.input_layernorm.weight", "layer-00003"),
        ("model.language_model.layers.3.input_layernorm.weight", "layer-00003"),
        ("model.embed_tokens.weight", EMBEDDING),
        ("language_model.model.embed_tokens.weight", EMBEDDING),
        ("model.norm.weight", REST),
        ("lm_head.weight", REST),
        ("language_model.lm_head.weight", REST),
        ("vision_tower.vision_model.encoder.layers.3.weight", None),
        ("model.vision_tower.layers.3.weight", None),
        ("model.visual.blocks.0.weight", None),
        ("multi_modal_projector.linear.weight", None),
        ("decoy.model.layers.3.weight", REST),
    ],
)
def test_a_tensor_s_name_says_its_part(tensor: str, part: str | None):
    assert part_of(tensor) == part


def test_a_layer_number_counts_only_where_text_layers_have_it():
    assert layer_of("model.layers.12.mlp.experts.3.weight") == 12
    assert layer_of("vision_tower.layers.12.weight") is None


@pytest.mark.parametrize(
    ("layers", "tied", "parts"),
    [
        ("0:1", False, {"layer-00000", EMBEDDING}),
        ("1:2", True, {"layer-00001"}),
        ("2:4", False, {"layer-00002", "layer-00003", REST}),
        ("3:4", True, {"layer-00003", REST, EMBEDDING}),
        ("0:4", True, {f"layer-0000{i}" for i in range(4)} | {REST, EMBEDDING}),
    ],
)
def test_the_head_takes_the_embedding_and_the_tail_the_rest(
    layers: str, tied: bool, parts: set[str]
):
    assert parts_of(LayerRange.parse(layers), 4, tied=tied) == parts


def test_layers_past_the_model_and_vision_towers_are_of_no_shard():
    whole = LayerRange(0, 4)
    assert is_needed("model.layers.3.x", whole, 4, tied=False)
    assert not is_needed("model.layers.4.x", whole, 4, tied=False)
    assert not is_needed("vision_tower.x", whole, 4, tied=False)
