"""Random checkpoints of any family, whose tensors are those that its weight table names."""

import json
from pathlib import Path

import numpy as np

from pals.engine.steps import Programs
from pals.models.configs import read_config
from pals.models.family import family_of
from pals.models.numerics import Numerics
from pals.models.weights import parameter_pieces
from pals.types import EngineLimits, LayerRange
from tests.checkpoints import write_tokenizer, write_weights


def make_random_checkpoint(folder: Path, config: dict[str, object], *, seed: int = 0) -> Path:
    """Write config, random float32 weights and tokenizer; return ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(seed)
    shapes = tensor_shapes(config)
    weights = {
        name: random.normal(scale=0.05, size=shape).astype(np.float32)
        for name, shape in sorted(shapes.items())
    }
    write_weights(folder, weights)
    write_tokenizer(folder)
    return folder


def tensor_shapes(config: dict[str, object]) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor that a model of this config reads."""
    model = read_config(config)
    layers = LayerRange(0, model.num_layers)
    programs = Programs(
        model, layers, numerics=Numerics.of("f32"), limits=EngineLimits(), num_pages=2
    )
    table = family_of(model).weights
    return {
        piece.source: piece.shape
        for path, parameter in programs.parameters.items()
        for piece in parameter_pieces(path, parameter.shape, model, layers, table, set())
    }
