"""The architectures of GGUF files that are imported: their tensors and their metadata.

Names and transforms are those of llama.cpp (https://github.com/ggml-org/llama.cpp):
`gguf-py/gguf/tensor_mapping.py` and the classes in its converter, `conversion/`.
Configs are spelled as the family's class in transformers 4 spells them; 5 reads them too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from pals.errors import CorruptModel, UnsupportedModel
from pals.models.gguf_reader import GgufHeader, Json

MAX_EXPERTS = 1 << 12
MAX_WIDTH = 1 << 20

Sizes = Mapping[str, int]
"""Sizes by letter: those of the glossary, and for rows of projections ``Q`` (N * H),
``K`` (kv heads * H) and ``M`` (width of one expert)."""


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of tensor.

    Attributes:
        ours: Its name in the GGUF file, of a layer's tensor without ``blk.{i}.``.
        theirs: Its Hugging Face name, of a layer's tensor without ``model.layers.{i}.``.
            ``{e}`` stands for an expert: the file stacks them all along the first axis.
        shape: One letter of `Sizes` for each axis of the file's tensor.
        optional: Name of the switch in `Architecture.switches` without which it is absent.
    """

    ours: str
    theirs: str
    shape: str
    optional: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How one value of ``general.architecture`` becomes a Hugging Face model.

    Attributes:
        layer: The tensors of each layer.
        config: Entries of config.json that are the family's own.
        keys: Metadata keys that ``config`` reads, without the architecture.
        switches: Switches of the config by the layer-0 tensor whose presence sets them.
        interleaved: Rows of q and k are stored in rotary pairs.
        norm_offset: What the converter added to each norm weight.
        activation_key: Name of the activation in config.json.
        activation: Its value.
    """

    model_type: str
    class_name: str
    layer: tuple[Row, ...]
    config: Callable[[GgufHeader, Sizes], dict[str, Json]]
    keys: frozenset[str] = frozenset()
    switches: Mapping[str, str] = field(default_factory=dict[str, str])
    interleaved: bool = False
    norm_offset: float = 0.0
    activation_key: str = "hidden_act"
    activation: str = "silu"


# --- tensors -------------------------------------------------------------------------

EMBEDDING = Row("token_embd.weight", "model.embed_tokens.weight", "VD")
FINAL_NORM = Row("output_norm.weight", "model.norm.weight", "D")
HEAD = Row("output.weight", "lm_head.weight", "VD")

_ATTENTION = (
    Row("attn_norm.weight", "input_layernorm.weight", "D"),
    Row("attn_q.weight", "self_attn.q_proj.weight", "QD"),
    Row("attn_k.weight", "self_attn.k_proj.weight", "KD"),
    Row("attn_v.weight", "self_attn.v_proj.weight", "KD"),
    Row("attn_output.weight", "self_attn.o_proj.weight", "DQ"),
)
_MLP = (
    Row("ffn_gate.weight", "mlp.gate_proj.weight", "FD"),
    Row("ffn_up.weight", "mlp.up_proj.weight", "FD"),
    Row("ffn_down.weight", "mlp.down_proj.weight", "DF"),
)
_MLP_NORM = Row("ffn_norm.weight", "post_attention_layernorm.weight", "D")
_QK_NORM = (
    Row("attn_q_norm.weight", "self_attn.q_norm.weight", "H"),
    Row("attn_k_norm.weight", "self_attn.k_norm.weight", "H"),
)
_LLAMA_BIASES = (
    Row("attn_q.bias", "self_attn.q_proj.bias", "Q", "attention_bias"),
    Row("attn_k.bias", "self_attn.k_proj.bias", "K", "attention_bias"),
    Row("attn_v.bias", "self_attn.v_proj.bias", "K", "attention_bias"),
    Row("attn_output.bias", "self_attn.o_proj.bias", "D", "attention_bias"),
    Row("ffn_gate.bias", "mlp.gate_proj.bias", "F", "mlp_bias"),
    Row("ffn_up.bias", "mlp.up_proj.bias", "F", "mlp_bias"),
    Row("ffn_down.bias", "mlp.down_proj.bias", "D", "mlp_bias"),
)
_QKV_BIASES = (
    Row("attn_q.bias", "self_attn.q_proj.bias", "Q"),
    Row("attn_k.bias", "self_attn.k_proj.bias", "K"),
    Row("attn_v.bias", "self_attn.v_proj.bias", "K"),
)
ROUTER = "ffn_gate_inp.weight"
_EXPERTS = (
    Row(ROUTER, "mlp.gate.weight", "ED"),
    Row("ffn_gate_exps.weight", "mlp.experts.{e}.gate_proj.weight", "EMD"),
    Row("ffn_up_exps.weight", "mlp.experts.{e}.up_proj.weight", "EMD"),
    Row("ffn_down_exps.weight", "mlp.experts.{e}.down_proj.weight", "EDM"),
)
_GEMMA_NORMS = (
    Row("post_attention_norm.weight", "post_attention_layernorm.weight", "D"),
    Row("ffn_norm.weight", "pre_feedforward_layernorm.weight", "D"),
    Row("post_ffw_norm.weight", "post_feedforward_layernorm.weight", "D"),
)


# --- config --------------------------------------------------------------------------


def _no_experts(header: GgufHeader, _: Sizes) -> dict[str, Json]:
    if header.integer("llama.expert_count", maximum=MAX_EXPERTS, default=0):
        problem = "`llama.expert_count` is not 0: Mixtral is not imported from GGUF"
        raise UnsupportedModel(source=header.source, problem=problem)
    return {}


def _qwen2(_: GgufHeader, __: Sizes) -> dict[str, Json]:
    return {"use_sliding_window": False}


def _qwen3(_: GgufHeader, __: Sizes) -> dict[str, Json]:
    return {"attention_bias": False, "use_sliding_window": False}


def _qwen3_moe(header: GgufHeader, sizes: Sizes) -> dict[str, Json]:
    return {
        "attention_bias": False,
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": sizes["M"],
        "num_experts": sizes["E"],
        "num_experts_per_tok": header.positive("qwen3moe.expert_used_count", maximum=sizes["E"]),
        # llama.cpp's graph of this architecture always normalises
        "norm_topk_prob": header.flag("qwen3moe.expert_weights_norm", default=True),
    }


def _gemma3(header: GgufHeader, sizes: Sizes) -> dict[str, Json]:
    # no key holds the attention scale; as llama.cpp does, tell the 27B by its depth
    is_27b = sizes["L"] == 62
    config: dict[str, Json] = {
        "attention_bias": False,
        "attn_logit_softcapping": _softcap(header, "gemma3.attn_logit_softcapping"),
        "final_logit_softcapping": _softcap(header, "gemma3.final_logit_softcapping"),
        "layer_types": [*_gemma3_layer_types(header, sizes["L"])],
        "query_pre_attn_scalar": sizes["D"] // sizes["N"] if is_27b else sizes["H"],
        "rope_local_base_freq": header.number("gemma3.rope.freq_base_swa", default=10_000.0),
    }
    if _WINDOW in header.metadata:
        config["sliding_window"] = header.positive(_WINDOW, maximum=1 << 30)
    return config


_WINDOW = "gemma3.attention.sliding_window"


def _softcap(header: GgufHeader, key: str) -> float | None:
    return header.number(key) if key in header.metadata else None


def _gemma3_layer_types(header: GgufHeader, num_layers: int) -> list[str]:
    """Return the kind of each layer: of six the last is global, unless the file says other."""
    key = "gemma3.attention.sliding_window_pattern"
    names = ("full_attention", "sliding_attention")
    if _WINDOW not in header.metadata:
        return [names[0]] * num_layers
    pattern = header.metadata.get(key, 6)
    if isinstance(pattern, np.ndarray) and pattern.dtype == np.bool_:
        if len(pattern) != num_layers:
            problem = f"`{key}` holds {len(pattern)} values for {num_layers} layers"
            raise CorruptModel(source=header.source, problem=problem)
        return [names[int(local)] for local in pattern.tolist()]
    period = header.positive(key, maximum=1 << 20, default=6)
    return [names[int((i + 1) % period != 0)] for i in range(num_layers)]


# --- the table -----------------------------------------------------------------------

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        model_type="llama",
        class_name="LlamaForCausalLM",
        layer=(*_ATTENTION, _MLP_NORM, *_MLP, *_LLAMA_BIASES),
        config=_no_experts,
        keys=frozenset({"expert_count", "expert_used_count"}),
        switches={"attention_bias": "attn_q.bias", "mlp_bias": "ffn_gate.bias"},
        interleaved=True,
    ),
    "qwen2": Architecture(
        model_type="qwen2",
        class_name="Qwen2ForCausalLM",
        layer=(*_ATTENTION, *_QKV_BIASES, _MLP_NORM, *_MLP),
        config=_qwen2,
    ),
    "qwen3": Architecture(
        model_type="qwen3",
        class_name="Qwen3ForCausalLM",
        layer=(*_ATTENTION, *_QK_NORM, _MLP_NORM, *_MLP),
        config=_qwen3,
    ),
    "qwen3moe": Architecture(
        model_type="qwen3_moe",
        class_name="Qwen3MoeForCausalLM",
        layer=(*_ATTENTION, *_QK_NORM, _MLP_NORM, *_EXPERTS),
        config=_qwen3_moe,
        keys=frozenset(
            {
                "expert_count",
                "expert_used_count",
                "expert_feed_forward_length",
                "expert_weights_norm",
            }
        ),
    ),
    "gemma3": Architecture(
        model_type="gemma3_text",
        class_name="Gemma3ForCausalLM",
        layer=(*_ATTENTION, *_QK_NORM, *_GEMMA_NORMS, *_MLP),
        config=_gemma3,
        keys=frozenset(
            {
                "attention.sliding_window",
                "attention.sliding_window_pattern",
                "attn_logit_softcapping",
                "final_logit_softcapping",
                "rope.freq_base_swa",
            }
        ),
        norm_offset=1.0,
        activation_key="hidden_activation",
        activation="gelu_pytorch_tanh",
    ),
}
