"""`pals models plan`: what a model takes, before anything of it is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter, validators

from pals import config
from pals.cli import console
from pals.cli.options import Json, Tokens, read_size, read_sizes
from pals.engine.memory import Memory, find_memory, format_bytes
from pals.types import Dtype, LayerRange, ShardSpec

if TYPE_CHECKING:
    from pals.engine.plan import ModelPlan

SHOWN_RUNS = 3
PER_TOKENS = 1024

Memories = Annotated[
    tuple[int, ...],
    Parameter(
        converter=read_sizes,
        negative="",
        help="Memory of a machine, such as `24GiB`; once for each. This machine's when left out.",
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A plan, and what it is of."""

    model: str
    spec: ShardSpec
    plan: ModelPlan
    machines: Sequence[Memory]

    @property
    def places(self) -> list[LayerRange | None]:
        """The range of each machine."""
        return self.plan.place(machine.size_bytes for machine in self.machines)

    @property
    def left_over(self) -> LayerRange | None:
        """The layers that no machine holds."""
        stop = max((place.stop for place in self.places if place is not None), default=0)
        return LayerRange(stop, self.plan.num_layers) if stop < self.plan.num_layers else None


def plan(
    model: str,
    /,
    *,
    memory: Memories = (),
    context: Tokens = None,
    sessions: Annotated[
        int | None, Parameter(validator=validators.Number(gte=1), help="Sessions at one time.")
    ] = None,
    kv_memory: Annotated[
        int | None,
        Parameter(converter=read_size, help="Memory for the KV cache, such as `2GiB`."),
    ] = None,
    dtype: Annotated[Dtype | None, Parameter(help="In which weights are held.")] = None,
    preset: Annotated[str | None, Parameter(help="Preset in configs/, by name or path.")] = None,
    json: Json = False,
) -> None:
    """Say what a model takes, layer by layer, and which machines hold it.

    Only its config.json is read.

    Args:
        model: Model name or folder.
        memory: Memory of each machine.
        context: Most tokens of one session.
        sessions: Most sessions at one time.
        kv_memory: Of each shard, for the KV cache.
        dtype: In which weights are held.
        preset: What `pals shard` would be started with.
        json: Print one JSON document on standard output.
    """
    settings = config.load_settings(preset).shard
    limits = settings.limits(sessions=sessions, context=context, kv_bytes=kv_memory)
    spec = ShardSpec(
        dtype=dtype or settings.dtype,
        limits=limits,
        quantization=settings.quantization,
        devices=settings.devices,
    )
    subject = _make_plan(model, memory, spec)
    if json:
        console.json(_document(subject))
    else:
        _print_layers(subject)
        _print_machines(subject)


def _make_plan(model: str, memory: Sequence[int], spec: ShardSpec) -> Subject:
    config.share_device_memory()
    # jax is imported here, once the command line is known to be right.
    from pals.engine.plan import plan_model
    from pals.engine.shard import check_limits
    from pals.models.lookup import load_config
    from pals.net.serving import limits_within

    model_config = load_config(model)
    limits = limits_within(spec.limits, model_config)
    if limits != spec.limits:
        console.note(f"context: {limits.max_context_tokens} tokens, the most this model takes")
    check_limits(limits, model_config)
    spec = replace(spec, limits=limits)
    return Subject(
        model=model,
        spec=spec,
        plan=plan_model(model_config, spec),
        machines=[Memory(size_bytes=size) for size in memory] or [find_memory(spec.devices)],
    )


# --- for people ----------------------------------------------------------------------


def _print_layers(subject: Subject) -> None:
    plan, whole = subject.plan, subject.plan.whole
    rows = [
        (
            f"{len(kind.layers)} x layer {show_layers(kind.layers)}",
            format_bytes(kind.weights),
            format_bytes(kind.kv_per_token * PER_TOKENS),
            format_bytes(plan.plan_range(LayerRange(first, first + 1)).kv),
            format_bytes(kind.workspace),
        )
        for kind in plan.kinds
        for first in kind.layers[:1]
    ]
    ends = [("embedding", plan.ends.embedding), ("final norm and head", plan.ends.head)]
    rows += [(name, format_bytes(size), "", "", "") for name, size in ends]
    kv_per_token = sum(kind.kv_per_token * len(kind.layers) for kind in plan.kinds)
    rows.append(
        (
            "all in one shard",
            format_bytes(whole.weights),
            format_bytes(kv_per_token * PER_TOKENS),
            format_bytes(whole.kv),
            format_bytes(whole.workspace),
        )
    )
    console.table(("part", "weights", "kv per 1k tokens", "kv", "workspace"), rows)
    dtype, limits = subject.spec.dtype, subject.spec.limits
    console.out(f"{dtype}, {limits.max_sessions} sessions of {limits.max_context_tokens} tokens")
    console.out("")


def _print_machines(subject: Subject) -> None:
    plan = subject.plan
    rows: list[tuple[object, ...]] = []
    for machine, place in zip(subject.machines, subject.places, strict=True):
        alone = plan.machines_needed(machine.size_bytes)
        rows.append(
            (
                machine,
                plan.layers_that_fit(machine.size_bytes),
                alone or "never enough",
                "-" if place is None else place,
                "-" if place is None else format_bytes(plan.plan_range(place).needed),
            )
        )
    console.table(("machine", "layers it holds", "machines needed", "range", "takes"), rows)
    console.out(_verdict(subject))


def _verdict(subject: Subject) -> str:
    left = subject.left_over
    used = sum(place is not None for place in subject.places)
    if left is None:
        return f"enough: {used} of {len(subject.machines)} machines hold all layers"
    largest = max(subject.machines, key=lambda machine: machine.size_bytes)
    more = subject.plan.machines_needed(largest.size_bytes, start=left.start)
    size = format_bytes(largest.size_bytes)
    advice = "" if more is None else f"; {more} more of {size} would hold them"
    missing = f"{len(left)} of {subject.plan.num_layers} layers are left over, {left}"
    return f"not enough: {missing}{advice}"


def show_layers(layers: Sequence[int]) -> str:
    """Return ascending numbers as ranges, such as ``0:3, 5:6``, the first few of many."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer:
            runs[-1][1] += 1
        else:
            runs.append([layer, layer + 1])
    shown = ", ".join(f"{start}:{stop}" for start, stop in runs[:SHOWN_RUNS])
    return f"{shown}, …" if len(runs) > SHOWN_RUNS else shown


# --- for programs --------------------------------------------------------------------


def _document(subject: Subject) -> dict[str, object]:
    plan, left = subject.plan, subject.left_over
    return {
        "schema": 1,
        "model": subject.model,
        "dtype": subject.spec.dtype,
        "max_sessions": subject.spec.limits.max_sessions,
        "max_context_tokens": subject.spec.limits.max_context_tokens,
        "layers": [
            {
                "layers": list(kind.layers),
                "weight_bytes": kind.weights,
                "kv_bytes_per_1k_tokens": kind.kv_per_token * PER_TOKENS,
                "workspace_bytes": kind.workspace,
            }
            for kind in plan.kinds
        ],
        "embedding_bytes": plan.ends.embedding,
        "head_bytes": plan.ends.head,
        "total": _range_document(plan, LayerRange(0, plan.num_layers)),
        "machines": [
            {
                "memory_bytes": machine.size_bytes,
                "layers_it_holds": plan.layers_that_fit(machine.size_bytes),
                "machines_needed": plan.machines_needed(machine.size_bytes),
                "shard": None if place is None else _range_document(plan, place),
            }
            for machine, place in zip(subject.machines, subject.places, strict=True)
        ],
        "left_over": None if left is None else str(left),
    }


def _range_document(plan: ModelPlan, layers: LayerRange) -> dict[str, object]:
    planned = plan.plan_range(layers)
    return {
        "layers": str(layers),
        "weight_bytes": planned.weights,
        "kv_bytes": planned.kv,
        "sampler_bank_bytes": planned.bank,
        "workspace_bytes": planned.workspace,
        "runtime_bytes": planned.runtime,
        "needed_bytes": planned.needed,
    }
