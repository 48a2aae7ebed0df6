"""Readings of families whose later layers have routed experts beside a shared one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from pals.models.configs.moe import MoEConfig, RouterConfig, checked_router, read_num_experts
from pals.models.configs.reader import (
    MAX_EXPERTS,
    MAX_INTERMEDIATE_SIZE,
    MAX_LAYERS,
    ConfigReader,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedMoEDefaults:
    """What a family's config leaves out may mean.

    Attributes:
        num_groups: ``n_group``.
        topk_groups: ``topk_group``.
        routed_scaling_factor: Of the same name.
        num_dense_layers: ``first_k_dense_replace``.
    """

    num_groups: int
    topk_groups: int
    routed_scaling_factor: float
    num_dense_layers: int


class SharedMoEFields(TypedDict):
    """Arguments of `SparseConfig`."""

    intermediate_size: int
    moe: tuple[MoEConfig | None, ...]
    num_mtp_layers: int


def read_shared_moe(
    reader: ConfigReader, num_layers: int, defaults: SharedMoEDefaults
) -> SharedMoEFields:
    """Read the feed-forward parts: the first layers are dense, all others alike."""
    reader.expect("moe_layer_freq", 1)
    dense = reader.integer(
        "first_k_dense_replace", MAX_LAYERS, default=defaults.num_dense_layers, least=0
    )
    size = reader.integer("moe_intermediate_size", MAX_INTERMEDIATE_SIZE)
    shared = reader.integer("n_shared_experts", MAX_EXPERTS, default=1)
    moe = MoEConfig(
        router=_read_router(reader, num_layers, defaults),
        intermediate_size=size,
        shared_intermediate_size=size * shared,
    )
    return SharedMoEFields(
        intermediate_size=reader.integer("intermediate_size", MAX_INTERMEDIATE_SIZE),
        moe=tuple(None if layer < dense else moe for layer in range(num_layers)),
        num_mtp_layers=reader.integer("num_nextn_predict_layers", MAX_LAYERS, default=0, least=0),
    )


def _read_router(
    reader: ConfigReader, num_layers: int, defaults: SharedMoEDefaults
) -> RouterConfig:
    reader.expect("scoring_func", "sigmoid")
    reader.expect("topk_method", "noaux_tc")
    num_experts = read_num_experts(reader)
    per_token = reader.integer("num_experts_per_tok", MAX_EXPERTS, default=8)
    groups = reader.integer("n_group", MAX_EXPERTS, default=defaults.num_groups)
    topk_groups = reader.integer("topk_group", MAX_EXPERTS, default=defaults.topk_groups)
    norm = reader.boolean("norm_topk_prob", default=True)
    scaling = reader.number("routed_scaling_factor", default=defaults.routed_scaling_factor)
    if num_experts < 2 * groups:
        # a group's score is the sum of its two best experts
        raise reader.corrupt(f"{num_experts} experts do not form {groups} groups of 2 or more")
    return checked_router(
        reader,
        num_layers,
        lambda: RouterConfig(
            kind="grouped_sigmoid",
            num_experts=num_experts,
            num_experts_per_tok=per_token,
            norm_topk_prob=norm,
            num_groups=groups,
            topk_groups=topk_groups,
            routed_scaling_factor=scaling,
            correction_bias=True,
        ),
    )
