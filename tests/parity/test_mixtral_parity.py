"""Mixtral: normalised weights, windows, its own names of experts."""

from tests.parity.matrix import ParityMatrix, references_of

reference, first_reference = references_of(
    "MixtralForCausalLM",
    {
        "window": {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 40,
            "sliding_window": 9,
        },
        "one-expert-each-tied": {
            "num_local_experts": 3,
            "num_experts_per_tok": 1,
            "intermediate_size": 36,
            "head_dim": 16,
            "tie_word_embeddings": True,
            "num_hidden_layers": 2,
        },
    },
)


class TestMixtral(ParityMatrix):
    pass
