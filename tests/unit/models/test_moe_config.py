import numpy as np
import pytest

from pals.errors import CorruptModel, UnsupportedModel
from pals.models.configs import read_config
from pals.models.family import family_of

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "vocab_size": 64,
}
QWEN3_MOE = {**COMMON, "model_type": "qwen3_moe", "num_experts": 8, "moe_intermediate_size": 24}
MIXTRAL = {**COMMON, "model_type": "mixtral", "num_local_experts": 8}


def test_qwen3_moe_reads_both_names_of_the_experts():
    renamed = {**QWEN3_MOE, "num_local_experts": 8}
    del renamed["num_experts"]

    assert read_config(renamed) == read_config(QWEN3_MOE)


@pytest.mark.parametrize(
    ("changes", "sparse"),
    [
        ({}, [True, True, True, True]),
        ({"decoder_sparse_step": 2}, [False, True, False, True]),
        ({"mlp_only_layers": [0, 3]}, [False, True, True, False]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, [False, False, False, True]),
        ({"mlp_only_layers": None}, [True, True, True, True]),
    ],
)
def test_layers_of_qwen3_moe_are_sparse_or_dense(changes, sparse):
    config = read_config(QWEN3_MOE | changes)

    assert [moe is not None for moe in config.moe] == sparse


@pytest.mark.parametrize("norm", [True, False])
def test_qwen3_moe_normalises_when_asked(norm):
    config = read_config(QWEN3_MOE | {"norm_topk_prob": norm})

    assert config.moe[0].router.norm_topk_prob is norm


def test_mixtral_always_normalises():
    assert read_config(MIXTRAL).moe[0].router.norm_topk_prob


@pytest.mark.parametrize(
    ("is_on", "window"), [(True, 9), (False, None)], ids=["sliding", "not sliding"]
)
def test_qwen3_moe_slides_only_when_it_is_turned_on(is_on, window):
    changes = {"use_sliding_window": is_on, "sliding_window": 9, "max_window_layers": 2}

    assert {a.window for a in read_config(QWEN3_MOE | changes).attention} == {window}


def test_parameters_count_every_expert():
    dense = read_config(QWEN3_MOE | {"mlp_only_layers": [0]}).layer_parameters(0)
    sparse = read_config(QWEN3_MOE).layer_parameters(0)

    assert sparse - dense == 8 * 3 * 32 * 24 + 8 * 32 - 3 * 32 * 48


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_experts_per_tok": 9}, "9 of 8 experts cannot be chosen"),
        ({"num_local_experts": 4}, "the number of experts is"),
        ({"mlp_only_layers": [4]}, "not integers below 4"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
    ],
)
def test_a_config_that_contradicts_itself_is_corrupt(changes, problem):
    with pytest.raises(CorruptModel, match=problem):
        read_config(QWEN3_MOE | changes)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_hidden_layers": 1024, "num_experts": 4096}, "experts are more than"),
        ({"num_experts": 1 << 20}, "the most is"),
        ({"router_temperature": 2.0}, "unknown keys"),
        ({"hidden_act": "relu"}, "hidden_act"),
    ],
)
def test_a_config_beyond_what_is_implemented_is_refused(changes, problem):
    with pytest.raises(UnsupportedModel, match=problem):
        read_config(QWEN3_MOE | changes)


@pytest.mark.parametrize(
    ("values", "own", "gate", "fused"),
    [
        (QWEN3_MOE, "mlp.experts.{}.gate_proj.weight", "mlp.experts.7.up_proj.weight", 24),
        (MIXTRAL, "block_sparse_moe.experts.{}.w1.weight", "block_sparse_moe.experts.7.w3.weight",
         48),
    ],
    ids=["qwen3_moe", "mixtral"],
)  # fmt: skip
def test_experts_are_found_in_both_spellings(values, own, gate, fused):
    table = family_of(read_config(values)).weights
    shape = (8, 2 * fused, 32)

    def pieces(present):
        return table.layer_pieces("mlp.experts.gate_up_proj.weight", "l.", shape, present)

    apart = pieces({"l." + own.format(e) for e in range(8)} | {"l." + gate})
    stacked = pieces({"l.mlp.experts.gate_up_proj"})

    assert [apart[0].source, apart[-1].source] == ["l." + own.format(0), "l." + gate]
    assert {piece.source for piece in stacked} == {"l.mlp.experts.gate_up_proj"}
    for parts in (apart, stacked):
        filled = np.zeros(shape[:2], int)
        for piece in parts:
            filled[piece.index, piece.rows] += 1
        assert (filled == 1).all()
