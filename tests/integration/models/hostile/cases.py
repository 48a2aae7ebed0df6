"""What a case is, and the well-formed folder that each of them spoils."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests import checkpoints

NUM_LAYERS = 2
HIDDEN_SIZE = 64

Spoil = Callable[[Path], None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One lie.

    Attributes:
        spoil: Changes a well-formed folder.
        error: The error that it has to end in.
        says: What its message has to contain: the file, then the problem.
        dtype: In which the shard is loaded.
    """

    spoil: Spoil
    error: str
    says: tuple[str, ...]
    dtype: str = "f32"


def corrupt(spoil: Spoil, *says: str, dtype: str = "f32") -> Case:
    return Case(spoil=spoil, error="CorruptModel", says=says, dtype=dtype)


def unsupported(spoil: Spoil, *says: str, dtype: str = "f32") -> Case:
    return Case(spoil=spoil, error="UnsupportedModel", says=says, dtype=dtype)


def not_found(spoil: Spoil, *says: str) -> Case:
    return Case(spoil=spoil, error="ModelNotFound", says=says)


def make_model(folder: Path) -> Path:
    """Write the model that is spoilt: 2 layers, one weight file."""
    return checkpoints.make_llama_checkpoint(folder, num_layers=NUM_LAYERS, seed=3)


def weights_of_model() -> dict[str, np.ndarray]:
    """Return the tensors of `make_model`."""
    shapes = checkpoints.llama_shapes(
        num_layers=NUM_LAYERS,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=96,
        q_size=64,
        kv_size=32,
        vocab_size=checkpoints.VOCAB_SIZE,
        tied=True,
        attention_bias=False,
        mlp_bias=False,
    )
    return checkpoints.random_weights(shapes, seed=3, dtype=np.float32)


def config_with(**changes: object) -> Spoil:
    """Change entries of config.json."""

    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def config_of(values: dict[str, object]) -> Spoil:
    """Put another config.json in place."""
    return file_with("config.json", json.dumps(values).encode())


def file_with(name: str, content: bytes) -> Spoil:
    """Put another file in place."""

    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return spoil


def link_to(name: str, target: str) -> Spoil:
    """Put a symbolic link in a file's place."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return spoil
