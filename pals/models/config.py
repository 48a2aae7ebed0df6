"""What a model's config.json says, checked once and frozen; imports no jax.

`ModelConfig` has what every family shares, `AttentionConfig` and `RopeConfig` describe
parts that several families use. `pals.models.configs` has a file for each family.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

MAX_PARAMETERS = 1 << 41

CacheShape = tuple[int, int]
"""Heads and width of one array that a layer keeps for each token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """Positions divided by ``factor`` (https://arxiv.org/abs/2306.15595)."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicScaling:
    """NTK-aware scaling of sequences longer than ``max_position_embeddings``.

    transformers turns the keys of one session by frequencies that change as it grows, so
    that its result depends on how the text was cut into steps. Within
    ``max_position_embeddings``, to which contexts are held here, nothing is scaled.
    """

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """How Llama 3.1 stretches its rotary frequencies for longer contexts."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """YaRN (https://arxiv.org/abs/2309.00071).

    Attributes:
        attention_factor: What cosine and sine are multiplied by.
        truncate: Round the range of dimensions that is blended to whole ones.
    """

    factor: float
    attention_factor: float
    beta_fast: float
    beta_slow: float
    original_max_position_embeddings: int
    truncate: bool


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (https://arxiv.org/abs/2104.09864).

    Attributes:
        theta: Base of the wavelengths.
        width: Dimensions of a head that turn; even.
    """

    theta: float
    width: int
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionConfig:
    """Grouped-query attention of one layer.

    Attributes:
        qkv_bias: Bias of the query, key and value projections.
        output_bias: Bias of the output projection.
        qk_norm: Normalise each head of queries and keys before they turn.
        window: Tokens that a query sees, itself included; None for all before it.
        sinks: A learned logit of each head takes part in the softmax.
        scale: What scores are multiplied by.
        rope: Place of its table in `ModelConfig.rope`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    sinks: bool = False
    rope: int = 0

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def cache_shapes(self) -> tuple[CacheShape, ...]:
        """Keys and values."""
        return ((self.num_kv_heads, self.head_dim),) * 2

    def parameters(self, hidden_size: int) -> int:
        """Return the parameters in its matrices."""
        return 2 * hidden_size * (self.q_size + self.kv_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttentionConfig:
    """Multi-head latent attention (https://arxiv.org/abs/2405.04434, section 2.1).

    Attributes:
        q_lora_rank: Width of the compressed queries; None where they are not compressed.
        kv_lora_rank: Width of the latent from which keys and values follow.
        qk_nope_head_dim: Dimensions of a query or key that do not turn.
        qk_rope_head_dim: Those that do, whose keys all heads share.
        v_head_dim: Width of a head's values.
        bias: Of the down projections and of the output projection.
        interleaved: Neighbouring dimensions turn together, not those half a head apart.
        scale: What scores are multiplied by.
        rope: Place of its table in `ModelConfig.rope`.
    """

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    bias: bool
    interleaved: bool
    scale: float
    rope: int = 0

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_size(self) -> int:
        """Width of what is kept of a token: its latent, then its shared turned key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def cache_shapes(self) -> tuple[CacheShape, ...]:
        """One array, as of a single key head."""
        return ((1, self.latent_size),)

    def parameters(self, hidden_size: int) -> int:
        """Return the parameters in its matrices."""
        q_size = self.num_heads * self.qk_head_dim
        rank = self.q_lora_rank
        queries = hidden_size * q_size if rank is None else rank * (hidden_size + q_size)
        up_size = self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        latents = hidden_size * self.latent_size + self.kv_lora_rank * up_size
        return queries + latents + self.num_heads * self.v_head_dim * hidden_size


Activation = Literal["silu", "gelu_tanh"]

StorageMethod = Literal["fp8", "awq", "gptq", "mxfp4"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationConfig:
    """How the matrices of a checkpoint are stored.

    Attributes:
        method: The format.
        bits: Of a code of AWQ and GPTQ.
        group_size: Columns that share a scale in AWQ and GPTQ; None for all of a row.
        block_size: Rows and columns that share a scale in fp8; None for the whole matrix.
        zero_offset: What is added to a stored zero point; 1 in the first GPTQ format.
    """

    method: StorageMethod
    bits: int = 4
    group_size: int | None = None
    block_size: tuple[int, int] | None = None
    zero_offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig(ABC):
    """What every decoder-only family has.

    Attributes:
        family: Its file in `pals.models`.
        rms_norm_eps: Added to the mean square before the root.
        tie_word_embeddings: The LM head is the embedding matrix.
        eos_token_ids: Tokens that end an answer, in the order of config.json.
        rope: The rotary tables that the layers refer to.
        attention: Of each layer.
        embedding_scale: What looked-up embeddings are multiplied by.
        norm_offset: Added to the weight of each norm.
        final_logit_softcap: Logits are squashed into this range by tanh.
        quantization: How the checkpoint stores its matrices, if not plainly.
        num_mtp_layers: Layers for multi-token prediction that a checkpoint may hold after
            the model's own; no shard reads them.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    rope: tuple[RopeConfig, ...]
    attention: tuple[AttentionConfig | LatentAttentionConfig, ...]
    embedding_scale: float = 1.0
    norm_offset: float = 0.0
    final_logit_softcap: float | None = None
    quantization: QuantizationConfig | None = None
    num_mtp_layers: int = 0

    def cache_shapes(self, layer: int) -> tuple[CacheShape, ...]:
        """Return the shapes of what layer ``layer`` keeps of each token."""
        return self.attention[layer].cache_shapes

    @abstractmethod
    def layer_parameters(self, layer: int) -> int:
        """Return the parameters in the matrices of layer ``layer``."""

    @property
    def parameter_count(self) -> int:
        """Parameters in the matrices of the whole model."""
        ends = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return ends + sum(self.layer_parameters(layer) for layer in range(self.num_layers))
