"""What config.json says about a model, checked once and frozen.

Both spellings are read: transformers 4 (``rope_theta``, ``rope_scaling``) and
transformers 5 (``rope_parameters``). A key that this version does not know is refused
by name rather than ignored: it could change the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from pals.errors import CorruptModel, UnsupportedModel

MAX_LAYERS = 1024
MAX_HEADS = 1024
MAX_HEAD_DIM = 1024
MAX_HIDDEN_SIZE = 1 << 17
MAX_INTERMEDIATE_SIZE = 1 << 20
MAX_VOCAB_SIZE = 1 << 22
MAX_POSITIONS = 1 << 24
MAX_PARAMETERS = 1 << 41
MAX_EOS_TOKENS = 64

USED_KEYS = frozenset(
    {
        "architectures",
        "attention_bias",
        "eos_token_id",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "mlp_bias",
        "model_type",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "tie_word_embeddings",
        "vocab_size",
    }
)

INERT_KEYS = frozenset(
    {
        "_name_or_path",
        "attention_dropout",
        "bos_token_id",
        "dtype",
        "initializer_range",
        "is_llama_config",
        "pad_token_id",
        "pretraining_tp",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "use_cache",
    }
)
"""Keys that say something about training, other programs, or the files only."""

ROPE_KEYS = {
    "default": frozenset[str](),
    "llama3": frozenset(
        {
            "factor",
            "high_freq_factor",
            "low_freq_factor",
            "original_max_position_embeddings",
        }
    ),
}

JsonObject = Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """How Llama 3.1 stretches its rotary frequencies for longer contexts."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (https://arxiv.org/abs/2104.09864)."""

    theta: float
    scaling: Llama3Scaling | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer of the Llama family.

    Attributes:
        rms_norm_eps: Added to the mean square before the root.
        tie_word_embeddings: The LM head is the embedding matrix.
        eos_token_ids: Tokens that end an answer, in the order of config.json.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_hf(cls, config: JsonObject, *, source: str = "config.json") -> ModelConfig:
        """Read a parsed config.json.

        Raises:
            UnsupportedModel: A family, key, value or size that is not implemented.
            CorruptModel: A value of the wrong type, or values that contradict each other.
        """
        return _Reader(config, source).read()

    @property
    def parameter_count(self) -> int:
        """Parameters in the matrices of the whole model."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        ends = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * (attention + mlp) + ends


@dataclass(frozen=True, slots=True)
class _Reader:
    """Takes checked values out of one config.json (or a table inside it)."""

    values: JsonObject
    source: str

    def read(self) -> ModelConfig:
        self.check_family()
        self.check_keys()
        num_heads = self.integer("num_attention_heads", MAX_HEADS)
        hidden_size = self.integer("hidden_size", MAX_HIDDEN_SIZE)
        vocab_size = self.integer("vocab_size", MAX_VOCAB_SIZE)
        config = ModelConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=self.integer("intermediate_size", MAX_INTERMEDIATE_SIZE),
            num_layers=self.integer("num_hidden_layers", MAX_LAYERS),
            num_heads=num_heads,
            num_kv_heads=self.integer("num_key_value_heads", MAX_HEADS, default=num_heads),
            head_dim=self.integer("head_dim", MAX_HEAD_DIM, default=hidden_size // num_heads),
            max_position_embeddings=self.integer(
                "max_position_embeddings", MAX_POSITIONS, default=2048
            ),
            rms_norm_eps=self.number("rms_norm_eps", default=1e-6),
            rope=self.rope(),
            attention_bias=self.boolean("attention_bias"),
            mlp_bias=self.boolean("mlp_bias"),
            tie_word_embeddings=self.boolean("tie_word_embeddings"),
            eos_token_ids=self.token_ids("eos_token_id", vocab_size),
        )
        self.check_shapes(config)
        return config

    def check_family(self) -> None:
        model_type = self.values.get("model_type")
        if model_type != "llama":
            raise self.unsupported(f"model_type {_shown(model_type)} is not `llama`")
        architectures = self.values.get("architectures")
        if architectures not in (None, ["LlamaForCausalLM"]):
            raise self.unsupported(f"architectures {_shown(architectures)}")
        activation = self.values.get("hidden_act", "silu")
        if activation != "silu":
            raise self.unsupported(f"hidden_act {_shown(activation)} is not `silu`")

    def check_keys(self) -> None:
        unknown = sorted(
            str(key)
            for key, value in self.values.items()
            if key not in USED_KEYS | INERT_KEYS and value is not None and value is not False
        )
        if unknown:
            raise self.unsupported(f"unknown keys {_shown(unknown)}")

    def check_shapes(self, config: ModelConfig) -> None:
        if config.num_heads % config.num_kv_heads:
            raise self.corrupt(
                f"{config.num_heads} heads do not divide among {config.num_kv_heads} kv heads"
            )
        if config.head_dim % 2:
            raise self.corrupt(f"head_dim {config.head_dim} is odd, which rotary needs even")
        if config.parameter_count > MAX_PARAMETERS:
            raise self.unsupported(f"{config.parameter_count} parameters are too many")

    def rope(self) -> RopeConfig:
        """Read transformers 5's ``rope_parameters``, else 4's two keys."""
        table = self.values.get("rope_parameters") or self.values.get("rope_scaling")
        if table is not None and not isinstance(table, Mapping):
            raise self.corrupt(f"rope parameters are {_shown(table)}, not a table")
        reader = _Reader(cast("JsonObject", table or {}), self.source)
        theta_from = reader if "rope_theta" in reader.values else self
        theta = theta_from.number("rope_theta", default=10000.0)
        return RopeConfig(theta=theta, scaling=reader.rope_scaling())

    def rope_scaling(self) -> Llama3Scaling | None:
        kind = self.values.get("rope_type", self.values.get("type", "default"))
        if not isinstance(kind, str) or kind not in ROPE_KEYS:
            raise self.unsupported(f"rope type {_shown(kind)}")
        unknown = set(self.values) - ROPE_KEYS[kind] - {"rope_type", "type", "rope_theta"}
        if unknown:
            raise self.unsupported(f"unknown rope keys {_shown(sorted(unknown))}")
        if kind == "default":
            return None
        scaling = Llama3Scaling(
            factor=self.number("factor"),
            low_freq_factor=self.number("low_freq_factor"),
            high_freq_factor=self.number("high_freq_factor"),
            original_max_position_embeddings=self.integer(
                "original_max_position_embeddings", MAX_POSITIONS
            ),
        )
        if scaling.low_freq_factor >= scaling.high_freq_factor:
            raise self.corrupt("rope low_freq_factor is not below high_freq_factor")
        return scaling

    def integer(self, key: str, most: int, *, default: int | None = None) -> int:
        """Return an integer in [1, ``most``]; null and absent mean the default."""
        value = self.values.get(key)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.corrupt(f"`{key}` is {_shown(value)}, not a positive integer")
        if value > most:
            raise self.unsupported(f"`{key}` is {_shown(value)}, the most is {most}")
        return value

    def number(self, key: str, *, default: float | None = None) -> float:
        value = self.values.get(key)
        if value is None:
            value = default
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.corrupt(f"`{key}` is {_shown(value)}, not a number")
        if not (0 < value < 1e18 and math.isfinite(value)):
            raise self.corrupt(f"`{key}` is {_shown(value)}, not a positive number")
        return float(value)

    def boolean(self, key: str) -> bool:
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.corrupt(f"`{key}` is {_shown(value)}, not true or false")
        return bool(value)

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        value = self.values.get(key)
        if value is None:
            return ()
        ids = cast("list[object]", value) if isinstance(value, list) else [value]
        if len(ids) > MAX_EOS_TOKENS or not all(
            isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab_size for i in ids
        ):
            raise self.corrupt(f"`{key}` is {_shown(ids)}, not token ids below {vocab_size}")
        return tuple(cast("list[int]", ids))

    def unsupported(self, problem: str) -> UnsupportedModel:
        return UnsupportedModel(source=self.source, problem=problem)

    def corrupt(self, problem: str) -> CorruptModel:
        return CorruptModel(source=self.source, problem=problem)


def _shown(value: object) -> str:
    """Return a bounded form of a value from the file for an error message."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
