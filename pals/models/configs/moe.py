"""What a config says about MoE layers: the router, the experts, and which layers have them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from pals.models.config import (
    ModelConfig,
)
from pals.models.configs.dense import AttentionSwitches, build_attention
from pals.models.configs.reader import MAX_EXPERTS, ConfigReader
from pals.models.configs.rope import read_rope
from pals.models.configs.shared import CommonFields, Heads

MAX_TOTAL_EXPERTS = 1 << 16
"""Experts in all layers; Kimi K2 has 23,424. Bounds the work on a config that lies."""

RouterKind = Literal["softmax_topk", "topk_softmax", "grouped_sigmoid", "uniform_topk"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """How the tokens of one layer are routed.

    Attributes:
        kind: The routing function; see `pals.models.router`.
        norm_topk_prob: Each token's weights are scaled to a sum of 1.
        num_groups: Groups of neighbouring experts, all of one size.
        topk_groups: Groups in which a token may choose.
        routed_scaling_factor: Multiplies the weights at the end.
        bias: The logits are affine.
        correction_bias: The checkpoint holds a bias that counts for the choice only.
    """

    kind: RouterKind
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool = True
    num_groups: int = 1
    topk_groups: int = 1
    routed_scaling_factor: float = 1.0
    bias: bool = False
    correction_bias: bool = False

    def __post_init__(self) -> None:
        """Refuse what no routing could fulfil.

        Raises:
            ValueError: An unknown kind, or numbers that contradict each other.
        """
        if self.kind not in get_args(RouterKind):
            raise ValueError(f"no router is called {self.kind!r}: choose of {get_args(RouterKind)}")
        group_size, rest = divmod(self.num_experts, self.num_groups)
        if rest:
            raise ValueError(f"{self.num_experts} experts do not form {self.num_groups} groups")
        if not 1 <= self.topk_groups <= self.num_groups:
            raise ValueError(f"{self.topk_groups} of {self.num_groups} groups cannot be chosen")
        candidates = group_size * self.topk_groups
        if not 1 <= self.num_experts_per_tok <= candidates:
            raise ValueError(f"{self.num_experts_per_tok} of {candidates} experts cannot be chosen")


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterOverride:
    """What an experiment changes in every router of a model; None leaves it."""

    kind: RouterKind | None = None
    num_experts_per_tok: int | None = None

    def apply(self, config: RouterConfig) -> RouterConfig:
        """Return the changed config.

        Raises:
            ValueError: The result makes no sense for this model.
        """
        chosen = self.num_experts_per_tok
        return replace(
            config,
            kind=config.kind if self.kind is None else self.kind,
            num_experts_per_tok=config.num_experts_per_tok if chosen is None else chosen,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """The feed-forward part of a MoE layer.

    Attributes:
        intermediate_size: F, of each expert.
        shared_intermediate_size: F of an expert that every token runs through.
        bias: The experts' projections are affine.
        swiglu_limit: Bound of gpt_oss's clamped SwiGLU; None for the plain one.
        swiglu_alpha: Steepness of its sigmoid.
    """

    router: RouterConfig
    intermediate_size: int
    shared_intermediate_size: int | None = None
    bias: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.702

    def parameters(self, hidden_size: int) -> int:
        """Return the parameters in its matrices."""
        experts = self.router.num_experts * self.intermediate_size
        mlp = 3 * hidden_size * (experts + (self.shared_intermediate_size or 0))
        return mlp + self.router.num_experts * hidden_size


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseConfig(ModelConfig):
    """A decoder whose layers are attention and, for some or all, MoE.

    Attributes:
        moe: One for each layer; None for a dense one.
        intermediate_size: F of the dense layers.
    """

    moe: tuple[MoEConfig | None, ...]
    intermediate_size: int

    def layer_parameters(self, layer: int) -> int:
        moe = self.moe[layer]
        mlp = (
            3 * self.hidden_size * self.intermediate_size
            if moe is None
            else moe.parameters(self.hidden_size)
        )
        return self.attention[layer].parameters(self.hidden_size) + mlp


def build_sparse(
    reader: ConfigReader,
    common: CommonFields,
    heads: Heads,
    switches: AttentionSwitches,
    moe: Sequence[MoEConfig | None],
    *,
    family: str,
    intermediate_size: int,
    theta: float = 10000.0,
) -> SparseConfig:
    """Read the rotary table and put the config together."""
    positions = common["max_position_embeddings"]
    return SparseConfig(
        family=family,
        **common,
        rope=(read_rope(reader, width=heads.head_dim, positions=positions, theta=theta),),
        attention=build_attention(heads, switches),
        moe=tuple(moe),
        intermediate_size=intermediate_size,
    )


def read_num_experts(reader: ConfigReader, *, default: int | None = None) -> int:
    """Read the number of experts, which transformers 4 and 5 call by two names."""
    spelled = {
        key: reader.integer(key, MAX_EXPERTS)
        for key in ("num_experts", "num_local_experts", "n_routed_experts")
        if reader.take(key) is not None
    }
    if len(set(spelled.values())) > 1:
        raise reader.corrupt(f"the number of experts is {spelled}")
    return reader.integer(next(iter(spelled), "num_experts"), MAX_EXPERTS, default=default)


def checked_router(
    reader: ConfigReader, num_layers: int, build: Callable[[], RouterConfig]
) -> RouterConfig:
    """Return the router that ``build`` makes, refusing what contradicts itself."""
    try:
        router = build()
    except ValueError as error:
        raise reader.corrupt(str(error)) from error
    if router.num_experts * num_layers > MAX_TOTAL_EXPERTS:
        raise reader.unsupported(
            f"{num_layers} layers of {router.num_experts} experts are more than "
            f"{MAX_TOTAL_EXPERTS} experts"
        )
    return router
