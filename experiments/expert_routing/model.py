"""A whole MoE model in one process, random or from a folder, that records its routing."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pals.engine.cache import lone_cache
from pals.models.build import AbstractModel, ParameterPath, Parameters
from pals.models.config import ModelConfig
from pals.models.configs import read_config
from pals.models.configs.moe import RouterOverride
from pals.models.hub import resolve_model
from pals.models.loading import load_shard_parameters
from pals.models.moe_options import MoEOptions, RoutingRecord
from pals.models.numerics import COMPUTE_DTYPES, Numerics
from pals.models.paged import lone_row
from pals.types import Dtype, LayerRange

RANDOM_CONFIG = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
"""A small Qwen3 MoE, whose weights are drawn."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        folder: Of a checkpoint; None draws the weights of `RANDOM_CONFIG`.
        dtype: Of the weights.
        seed: Of drawn weights.
    """

    folder: Path | None
    dtype: Dtype
    seed: int

    def read_config(self) -> ModelConfig:
        """Return the model's config."""
        if self.folder is None:
            return read_config(RANDOM_CONFIG)
        return read_config(json.loads((self.folder / "config.json").read_text()))

    def load(self, numerics: Numerics, parameters: Parameters) -> Sequence[jax.Array]:
        """Return the parameters, read or drawn."""
        if self.folder is None:
            return draw_parameters(parameters, self.seed)
        snapshot = resolve_model(str(self.folder.absolute()))
        layers = LayerRange(0, snapshot.config.num_layers)
        return load_shard_parameters(snapshot, layers, numerics, parameters).leaves


def draw_parameters(parameters: Parameters, seed: int) -> list[jax.Array]:
    """Return random matrices of variance 1 / columns, and norms of 1."""
    random = np.random.default_rng(seed)

    def draw(path: ParameterPath, parameter: jax.ShapeDtypeStruct) -> jax.Array:
        if len(parameter.shape) == 1:
            return jnp.full(parameter.shape, float("norm" in str(path)), parameter.dtype)
        values = random.standard_normal(parameter.shape, dtype=np.float32)
        return jnp.asarray(values / np.sqrt(parameter.shape[-1]), parameter.dtype)

    return [draw(path, parameter) for path, parameter in parameters.items()]


class RoutedModel:
    """Runs texts and gives their logits and the routing of every MoE layer.

    Args:
        source: Whose weights are loaded once; see `with_override`.
        override: Changes every router.
        leaves: Weights that are loaded already.
    """

    def __init__(
        self,
        source: Source,
        override: RouterOverride | None = None,
        leaves: Sequence[jax.Array] | None = None,
    ) -> None:
        self.source = source
        self.config = source.read_config()
        self._records: list[RoutingRecord] = []
        self._lock = threading.Lock()
        options = MoEOptions(override=override or RouterOverride(), trace=self._record)
        numerics = Numerics(
            compute=COMPUTE_DTYPES[source.dtype], platform=jax.default_backend(), moe=options
        )
        layers = LayerRange(0, self.config.num_layers)
        self._model = AbstractModel.build(self.config, layers, numerics)
        self._leaves = leaves or source.load(numerics, self._model.parameters)
        self._step = jax.jit(self._forward)

    def with_override(self, override: RouterOverride) -> RoutedModel:
        """Return the same weights behind other routers."""
        return RoutedModel(self.source, override, self._leaves)

    def run(self, token_ids: np.ndarray) -> tuple[np.ndarray, list[RoutingRecord]]:
        """Run one text [T]; returns logits [T, V] and the records, by layer."""
        self._records = []
        logits = np.asarray(self._step(self._leaves, jnp.asarray(token_ids, jnp.int32)))
        jax.effects_barrier()
        return logits, sorted(self._records, key=lambda record: record.layer)

    def _record(self, record: RoutingRecord) -> None:
        with self._lock:
            self._records.append(record)

    def _forward(self, leaves: Sequence[jax.Array], token_ids: jax.Array) -> jax.Array:
        model = self._model.merge(leaves)
        layers = LayerRange(0, self.config.num_layers)
        length = token_ids.shape[0]
        dtype = COMPUTE_DTYPES[self.source.dtype]
        cache = lone_cache(self.config, layers, tokens=length, dtype=dtype)
        hidden, _ = model(token_ids, cache, *lone_row(length, 0, cache[0][0].shape[1]))
        return model.forward_logits(hidden)
