"""Mistral: with a sliding window that the prompt outgrows, and without."""

from tests.parity.matrix import ParityMatrix, reference_of

reference = reference_of(
    "MistralForCausalLM",
    {
        "window": {"sliding_window": 16, "head_dim": 20},
        "no-window": {"sliding_window": None, "tie_word_embeddings": True},
    },
)


class TestMistral(ParityMatrix):
    pass
