"""Parts of our models beside the same parts of transformers', on the same weights.

A test of whole logits says that something is wrong; these say where. Inputs are random
hidden states, so that no part depends on the ones before it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pals.config import CACHE_DIR_VARIABLE
from pals.models.decoder import Decoder
from pals.models.paged import Rows, make_rows
from pals.models.rope import rotate
from pals.models.snapshot import Snapshot
from pals.types import LayerRange
from tests.parity.matrix import COMMON, build_model, empty_cache, one_row, save_random_model

TOKENS = 21
ATOL = 2e-5


@dataclass(frozen=True)
class Parts:
    """One random model twice.

    Attributes:
        theirs: transformers' model.
        ours: Ours, whole.
        hidden: Hidden states [1, T, D] in float32.
    """

    theirs: object
    ours: Decoder
    hidden: np.ndarray

    @property
    def tokens(self) -> jax.Array:
        """The hidden states as our layers take them, [T, D]."""
        return jnp.array(self.hidden[0])

    def with_hidden(self, hidden: np.ndarray) -> "Parts":
        """Return the same models beside other hidden states."""
        return replace(self, hidden=hidden)

    def rows(self) -> Rows:
        """Return the rows of one sequence."""
        return make_rows(self.ours.config, *one_row(TOKENS))

    def their_tables(self, *layer_type: str) -> tuple:
        """Return cosine and sine [1, T, R] of transformers; some differ between layers."""
        import torch

        positions = torch.arange(TOKENS)[None]
        return self.theirs.model.rotary_emb(torch.tensor(self.hidden), positions, *layer_type)

    def call(self, module: object, *arguments: object, **options: object) -> np.ndarray:
        """Run a module of transformers over the hidden states; returns its first output."""
        import torch

        with torch.no_grad():
            output = module(torch.tensor(self.hidden), *arguments, **options)
        return (output[0] if isinstance(output, tuple) else output).numpy()

    def their_attention(
        self,
        layer: int,
        *layer_type: str,
        window: int | None = None,
        cache: object = None,
    ) -> np.ndarray:
        """Return what transformers' attention makes of the hidden states, [1, T, D].

        Args:
            layer: Number of the layer.
            layer_type: Where it decides on the rotary table.
            window: Tokens that a query sees, itself included.
            cache: transformers' cache, which is written.
        """
        import torch

        ages = np.arange(TOKENS)[:, None] - np.arange(TOKENS)
        visible = (ages >= 0) & (ages < (window or TOKENS))
        mask = torch.tensor(np.where(visible, 0.0, -np.inf), dtype=torch.float32)[None, None]
        module = self.theirs.model.layers[layer].self_attn
        return self.call(module, self.their_tables(*layer_type), mask, past_key_values=cache)

    def our_attention(self, layer: int) -> tuple[np.ndarray, tuple[jax.Array, ...]]:
        """Return what our attention makes of them, and the cache that it wrote."""
        (cache,) = empty_cache(self.ours.config, LayerRange(layer, layer + 1))
        found, cache = self.ours.layers[layer].self_attn(self.tokens, cache, self.rows())
        return np.asarray(found)[None], cache

    def assert_same_norms(self) -> None:
        """Compare the norms before attention and MLP, and the final one."""
        theirs, ours = self.theirs.model, self.ours
        for number, layer in enumerate(ours.layers):
            for name in ("input_layernorm", "post_attention_layernorm"):
                found = getattr(layer, name)(self.tokens)
                expected = self.call(getattr(theirs.layers[number], name))
                assert_same(found, expected, f"{number}.{name}")
        assert_same(ours.norm(self.tokens), self.call(theirs.norm), "norm")

    def assert_same_turns(self, apply_rotary_pos_emb: Callable[..., tuple]) -> None:
        """Compare rotary embedding with transformers' function of the family."""
        import torch

        (table,) = self.rows().rope
        heads = self.hidden[..., None, : table.cos.shape[-1]]
        theirs = torch.tensor(heads).transpose(1, 2)

        expected, _ = apply_rotary_pos_emb(theirs, theirs, *self.their_tables())

        turned = rotate(jnp.array(heads[0]), table)[None]
        assert_same(turned, expected.transpose(1, 2).numpy(), "rope")

    def assert_same_routing(self, layer: int, *, name: str = "gate") -> None:
        """Raise unless both routers give each token the same experts and weights."""
        import torch

        router = getattr(self.theirs.model.layers[layer].mlp, name)
        with torch.no_grad():
            _, weights, ids = router(torch.tensor(self.hidden[0]))
        routing = self.ours.layers[layer].mlp.gate(self.tokens)

        order = np.argsort(ids.numpy(), axis=-1)
        ours = np.argsort(np.asarray(routing.expert_ids), axis=-1)
        chosen = np.take_along_axis(np.asarray(routing.expert_ids), ours, axis=-1)
        np.testing.assert_array_equal(chosen, np.take_along_axis(ids.numpy(), order, axis=-1))
        found = np.take_along_axis(np.asarray(routing.weights), ours, axis=-1)
        assert_same(found, np.take_along_axis(weights.numpy(), order, axis=-1), "weights")


def parts_of(models: Mapping[str, tuple[str, Mapping[str, object]]]):
    """Return a fixture over models, each a class of transformers and its config."""

    @pytest.fixture(scope="module", params=list(models), ids=str, name="parts")
    def parts(request, tmp_path_factory, shared_cache):
        architecture, values = models[request.param]
        folder = tmp_path_factory.mktemp(request.param)
        theirs = save_random_model(folder, architecture, {**COMMON, **values}, seed=7)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(CACHE_DIR_VARIABLE, str(shared_cache))
            snapshot = Snapshot.open(folder, "test/model")
        config = snapshot.config
        ours = build_model(snapshot, LayerRange(0, config.num_layers))
        shape = (1, TOKENS, config.hidden_size)
        hidden = np.random.default_rng(11).standard_normal(shape, np.float32)
        return Parts(theirs, ours, hidden)

    return parts


def assert_same(found: jax.Array | np.ndarray, expected: np.ndarray, part: str) -> None:
    """Raise unless both are equal to rounding; ``part`` names what was compared."""
    found = np.asarray(found).reshape(expected.shape)
    np.testing.assert_allclose(found, expected, atol=ATOL, rtol=2e-5, err_msg=part)
