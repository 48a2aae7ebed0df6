"""Reads config.json of every family; imports no jax, since a driver needs none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import cast

from pals.models.config import MAX_PARAMETERS, ModelConfig
from pals.models.configs import (
    deepseek_v3,
    gemma3,
    glm4_moe,
    gpt_oss,
    llama,
    mistral,
    mixtral,
    qwen2,
    qwen3,
    qwen3_moe,
)
from pals.models.configs.quantization import read_quantization
from pals.models.configs.reader import ConfigReader, JsonObject, shown


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyEntry:
    """One family, as config.json names it.

    Attributes:
        architectures: Classes of transformers that a text model of the family may name.
        read: Takes the config out of a reader.
        covers: The models that users know, for docs/models.md.
        source: Where the family is described.
        bundled_code: What `auto_map` may name: classes of code that checkpoints bring along
            for older versions of transformers, which stays unread.
    """

    architectures: tuple[str, ...]
    read: Callable[[ConfigReader], ModelConfig]
    covers: str
    source: str
    bundled_code: frozenset[str] = frozenset()


DEEPSEEK_V3 = FamilyEntry(
    architectures=("DeepseekV3ForCausalLM",),
    read=deepseek_v3.read,
    covers="DeepSeek V3, V3.1, R1; Kimi K2",
    source="https://arxiv.org/abs/2412.19437",
    bundled_code=frozenset(
        {
            "configuration_deepseek.DeepseekV3Config",
            "modeling_deepseek.DeepseekV3Model",
            "modeling_deepseek.DeepseekV3ForCausalLM",
        }
    ),
)

FAMILIES: dict[str, FamilyEntry] = {
    "gemma3": FamilyEntry(
        architectures=("Gemma3ForConditionalGeneration",),
        read=gemma3.read_multimodal,
        covers="Gemma 3 4B, 12B, 27B, of which the text model is run",
        source="https://arxiv.org/abs/2503.19786",
    ),
    "gemma3_text": FamilyEntry(
        architectures=("Gemma3ForCausalLM",),
        read=gemma3.read,
        covers="Gemma 3 270M and 1B",
        source="https://arxiv.org/abs/2503.19786",
    ),
    "gpt_oss": FamilyEntry(
        architectures=("GptOssForCausalLM",),
        read=gpt_oss.read,
        covers="gpt-oss 20b and 120b",
        source="https://arxiv.org/abs/2508.10925",
    ),
    "llama": FamilyEntry(
        architectures=("LlamaForCausalLM",),
        read=llama.read,
        covers="Llama 2, 3, 3.1, 3.2, 3.3; SmolLM2; other models of this architecture",
        source="https://arxiv.org/abs/2302.13971",
    ),
    "mistral": FamilyEntry(
        architectures=("MistralForCausalLM",),
        read=mistral.read,
        covers="Mistral 7B, Nemo, Small",
        source="https://arxiv.org/abs/2310.06825",
    ),
    "mixtral": FamilyEntry(
        architectures=("MixtralForCausalLM",),
        read=mixtral.read,
        covers="Mixtral 8x7B, 8x22B",
        source="https://arxiv.org/abs/2401.04088",
    ),
    "qwen2": FamilyEntry(
        architectures=("Qwen2ForCausalLM",),
        read=qwen2.read,
        covers="Qwen2, Qwen2.5, Qwen2.5 Coder, QwQ",
        source="https://arxiv.org/abs/2407.10671",
    ),
    "qwen3": FamilyEntry(
        architectures=("Qwen3ForCausalLM",),
        read=qwen3.read,
        covers="Qwen3 0.6B to 32B",
        source="https://arxiv.org/abs/2505.09388",
    ),
    "qwen3_moe": FamilyEntry(
        architectures=("Qwen3MoeForCausalLM",),
        read=qwen3_moe.read,
        covers="Qwen3 30B-A3B, 235B-A22B, Qwen3 Coder 30B-A3B and 480B-A35B",
        source="https://arxiv.org/abs/2505.09388",
    ),
    "glm4_moe": FamilyEntry(
        architectures=("Glm4MoeForCausalLM",),
        read=glm4_moe.read,
        covers="GLM-4.5, GLM-4.5-Air, GLM-4.6",
        source="https://arxiv.org/abs/2508.06471",
    ),
    "deepseek_v3": DEEPSEEK_V3,
    "kimi_k2": DEEPSEEK_V3,
}
"""Families by the ``model_type`` of config.json."""


def read_config(values: JsonObject, *, source: str = "config.json") -> ModelConfig:
    """Read a parsed config.json.

    Raises:
        UnsupportedModel: A family, key, value or size that is not implemented.
        CorruptModel: A value of the wrong type, or values that contradict each other.
    """
    reader = ConfigReader(values, source)
    model_type = reader.take("model_type")
    entry = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if entry is None:
        known = ", ".join(f"`{name}`" for name in FAMILIES)
        raise reader.unsupported(f"model_type {shown(model_type)} is not one of {known}")
    _check_bundled_code(reader, entry)
    architectures = reader.take("architectures")
    if architectures is not None and architectures not in [[one] for one in entry.architectures]:
        raise reader.unsupported(f"architectures {shown(architectures)}")
    quantization = reader.table("quantization_config")
    config = entry.read(reader)
    if quantization is not None:
        config = replace(config, quantization=read_quantization(quantization))
    if config.parameter_count > MAX_PARAMETERS:
        raise reader.unsupported(f"{config.parameter_count} parameters are too many")
    return config


def _check_bundled_code(reader: ConfigReader, entry: FamilyEntry) -> None:
    auto_map = reader.take("auto_map")
    if auto_map is None:
        return
    values = cast("JsonObject", auto_map).values() if isinstance(auto_map, Mapping) else [auto_map]
    if not all(isinstance(value, str) and value in entry.bundled_code for value in values):
        raise reader.unsupported("`auto_map` asks for code of its own, which is never run")
