"""Mistral: with a sliding window that the prompt outgrows, and without."""

from tests.parity.matrix import ParityMatrix, references_of

reference, first_reference = references_of(
    "MistralForCausalLM",
    {
        "window": {"sliding_window": 16, "head_dim": 20},
        "no-window": {"sliding_window": None, "tie_word_embeddings": True},
    },
)


class TestMistral(ParityMatrix):
    pass
