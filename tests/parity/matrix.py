"""The parity matrix: our models against transformers', on tiny random checkpoints.

A family's file makes fixtures of its configs with `references_of` and inherits its tests
from `ParityMatrix`. Everything is float32 on the CPU.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from pals.config import CACHE_DIR_VARIABLE
from pals.engine.buckets import BatchLimits
from pals.engine.cache import lone_cache
from pals.engine.local import LocalChain
from pals.models.build import AbstractModel
from pals.models.config import ModelConfig
from pals.models.decoder import Cache, Decoder
from pals.models.loading import load_shard_parameters
from pals.models.numerics import Numerics
from pals.models.paged import StepShape, Tables, lone_row
from pals.models.snapshot import Snapshot
from pals.types import EngineLimits, LayerRange
from tests.checkpoints import EOS_ID, VOCAB_SIZE, write_tokenizer
from tests.unit.engine.chains import generate, load_chain

LIMITS = EngineLimits(max_sessions=2, max_context_tokens=160, max_chunk_tokens=32)
PROMPT = [256, *b"In the beginning there was a small random model."]
NEW_TOKENS = 32
ATOL = 1e-4
NUMERICS = Numerics.of("f32")

COMMON = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "initializer_range": 0.3,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": EOS_ID,
    "pad_token_id": None,
}
"""Sizes of the tiny models; a family's configs add to them and replace some."""

PERTURBED = r"bias$|norm|sinks"
"""Parameters that transformers starts at 0 or 1, where a mistake would not show."""


@dataclass(frozen=True)
class Reference:
    """transformers' model and our snapshot of what it saved."""

    model: object
    snapshot: Snapshot

    @property
    def num_layers(self) -> int:
        return self.snapshot.config.num_layers

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Return transformers' logits [T, V] of one forward."""
        import torch

        with torch.no_grad():
            return self.model(torch.tensor([tokens])).logits[0].float().numpy()

    def embedding(self, tokens: Sequence[int]) -> np.ndarray:
        """Return the mean [D] of transformers' last hidden states, after the final norm."""
        import torch

        with torch.no_grad():
            output = self.model(torch.tensor([tokens]), output_hidden_states=True)
        return output.hidden_states[-1][0].float().numpy().mean(axis=0)

    def answer(self, prompt: Sequence[int]) -> list[int]:
        """Return transformers' greedy answer."""
        import torch

        output = self.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return output[0, len(prompt) :].tolist()


def references_of(
    architecture: str,
    configs: Mapping[str, Mapping[str, object]],
    *,
    common: Mapping[str, object] = COMMON,
):
    """Return the fixtures of a family: one over all configs, one for its first alone.

    Args:
        architecture: A class of transformers.
        configs: What each adds to ``common``.
        common: Sizes of the tiny models.
    """

    def make(request, tmp_path_factory, shared_cache):
        seed = list(configs).index(request.param)
        folder = tmp_path_factory.mktemp(request.param)
        values = {**common, **configs[request.param]}
        model = save_random_model(folder, architecture, values, seed=seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(CACHE_DIR_VARIABLE, str(shared_cache))
            yield Reference(model, Snapshot.open(folder, "test/model"))

    names = list(configs)
    every = pytest.fixture(scope="module", params=names, ids=str, name="reference")(make)
    first = pytest.fixture(scope="module", params=names[:1], ids=str, name="first_reference")(make)
    return every, first


def save_random_model(
    folder: Path, architecture: str, values: Mapping[str, object], *, seed: int
) -> object:
    """Make a random model of transformers, save it to ``folder`` and return it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    model_class = getattr(transformers, architecture)
    model = model_class(model_class.config_class(**values)).eval()
    with torch.no_grad():
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            if re.search(PERTURBED, name):
                tensor.add_(0.2 * torch.randn_like(tensor))
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def splits(num_layers: int) -> list[list[int]]:
    """Return every way to cut the layers into shards, as the shards' first layers."""
    inner = range(1, num_layers)
    return [
        [0, *cuts] for count in range(num_layers) for cuts in itertools.combinations(inner, count)
    ]


class Chain:
    """Our model cut into shards that run one after another, outside of the engine."""

    def __init__(self, snapshot: Snapshot, cuts: Sequence[int]) -> None:
        config = snapshot.config
        ends = [*cuts[1:], config.num_layers]
        ranges = [LayerRange(start, stop) for start, stop in zip(cuts, ends, strict=True)]
        self.models = [build_model(snapshot, layers) for layers in ranges]
        self.caches = [empty_cache(config, layers) for layers in ranges]

    def logits(self, tokens: Sequence[int], start: int = 0) -> np.ndarray:
        """Return logits [T, V] of one step over tokens that begin at ``start``."""
        x = jnp.array(tokens)
        shape, tables = one_row(len(tokens), start)
        for number, model in enumerate(self.models):
            x, self.caches[number] = model(x, self.caches[number], shape, tables)
        return np.asarray(self.models[-1].forward_logits(x))

    def answer(self, prompt: Sequence[int]) -> list[int]:
        """Return the greedy answer."""
        tokens = [int(self.logits(prompt)[-1].argmax())]
        for position in range(len(prompt), len(prompt) + NEW_TOKENS - 1):
            tokens.append(int(self.logits(tokens[-1:], position)[-1].argmax()))
        return tokens


def empty_cache(config: ModelConfig, layers: LayerRange) -> Cache:
    """Return room for one sequence in some layers."""
    return lone_cache(config, layers, tokens=LIMITS.max_context_tokens, dtype=NUMERICS.compute)


def one_row(tokens: int, start: int = 0) -> tuple[StepShape, Tables]:
    """Return a step of that sequence."""
    return lone_row(tokens, start, 1 + BatchLimits.of(LIMITS).max_pages)


def build_model(snapshot: Snapshot, layers: LayerRange) -> Decoder:
    """Return our model over ``layers``, its parameters read from the snapshot."""
    model = AbstractModel.build(snapshot.config, layers, NUMERICS)
    return model.merge(load_shard_parameters(snapshot, layers, NUMERICS, model.parameters).leaves)


@pytest.mark.parity
@pytest.mark.timeout(600)
class ParityMatrix:
    """The tests of one family; a subclass stands beside the fixtures of `references_of`."""

    def test_logits_equal_those_of_transformers_in_every_split(self, reference: Reference):
        expected = reference.logits(PROMPT)

        for cuts in splits(reference.num_layers):
            found = Chain(reference.snapshot, cuts).logits(PROMPT)
            np.testing.assert_allclose(found, expected, atol=ATOL, err_msg=f"cuts {cuts}")

    def test_logits_of_cached_steps_equal_one_forward(self, reference: Reference):
        expected = reference.logits(PROMPT)
        chain = Chain(reference.snapshot, list(range(reference.num_layers)))

        parts = [chain.logits(PROMPT[:20]), chain.logits(PROMPT[20:33], 20)]
        parts += [chain.logits(PROMPT[i : i + 1], i) for i in range(33, len(PROMPT))]

        np.testing.assert_allclose(np.concatenate(parts), expected, atol=ATOL)

    def test_greedy_tokens_equal_those_of_transformers_in_every_split(self, reference: Reference):
        expected = reference.answer(PROMPT)
        assert len(set(expected)) > 2

        for cuts in splits(reference.num_layers):
            assert Chain(reference.snapshot, cuts).answer(PROMPT) == expected, f"cuts {cuts}"

    def test_greedy_tokens_and_embeddings_of_the_engine_equal_those_of_transformers(
        self, first_reference: Reference
    ):
        snapshot, cut = first_reference.snapshot, first_reference.num_layers - 1
        chain = load_chain(snapshot, [0, cut], "f32", LIMITS)

        found = generate(chain, PROMPT, slot=1, count=NEW_TOKENS, chunk=25)

        assert found == first_reference.answer(PROMPT)
        embedded = LocalChain(chain).embed(PROMPT)
        np.testing.assert_allclose(embedded, first_reference.embedding(PROMPT), atol=ATOL)
