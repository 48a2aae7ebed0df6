"""What a model takes on a device, layer by layer, computed from its config alone.

Weights and cache are the shapes that the engine would allocate. The workspace is what XLA
says of one-layer programs compiled without weights: a program of many layers needs as much
as that of its largest layer, since each layer's temporaries are free when the next begins.
A formula would have to follow every family's forward pass and XLA's own choices.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import jax

from pals.engine.bank import bank_bytes
from pals.engine.buckets import Program
from pals.engine.budget import RUNTIME_BASE_BYTES
from pals.engine.cache import kv_bytes, page_format
from pals.engine.compile_cache import programs_folder, use_compilation_cache
from pals.engine.pages import PageFormat
from pals.engine.stepping import sampled_rows, step_shape
from pals.engine.steps import Programs
from pals.models.build import ParameterPath
from pals.models.config import CacheShape, ModelConfig
from pals.models.numerics import Numerics
from pals.models.spread import device_bytes
from pals.types import EngineLimits, LayerRange, ShardSpec

PROGRAM_BYTES = 1_200_000
"""Host memory that one layer of one compiled program takes, its compilation included."""

HEADROOM = 1.1
"""A plan fits a machine that has a tenth more than it, for what nothing accounts for."""

_LayerLeaves = tuple[tuple[ParameterPath, jax.ShapeDtypeStruct], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RangePlan:
    """What a shard takes on each of its devices.

    Attributes:
        weights: Device bytes of its parameters.
        kv: Device bytes of the cache that it reserves.
        bank: Device bytes of what its sampler keeps of sessions, at the tail.
        workspace: Device bytes of the temporaries of its largest program.
        runtime: Host bytes of its process beside these: Python, jax, libp2p, programs.
    """

    weights: int
    kv: int
    bank: int
    workspace: int
    runtime: int

    @property
    def device(self) -> int:
        """Bytes on the device."""
        return self.weights + self.kv + self.bank + self.workspace

    @property
    def needed(self) -> int:
        """Bytes that a machine must have to hold it."""
        return math.ceil((self.device + self.runtime) * HEADROOM)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """What each of some equal layers takes.

    Attributes:
        layers: Their numbers, ascending.
        weights: Device bytes of one layer's parameters.
        kv_per_token: Device bytes of cache that one layer keeps of each token.
        workspace: Device bytes of the temporaries of programs of such layers.
    """

    layers: tuple[int, ...]
    weights: int
    kv_per_token: int
    workspace: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EndsPlan:
    """What a model takes beside its layers.

    Attributes:
        embedding: Device bytes of weights at the head: the token embedding.
        head: Device bytes of weights at the tail: the final norm and the LM head.
        both: Device bytes of weights at a shard that is head and tail, which holds an
            embedding that is tied to the LM head once.
        sampling: Device bytes of the temporaries at the tail, where it samples.
        bank: Device bytes of what the sampler keeps of sessions there.
    """

    embedding: int
    head: int
    both: int
    sampling: int
    bank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """What each range of a model's layers takes; made by `plan_model`.

    Attributes:
        kinds: The layers, equal ones together, by their first.
        ends: Embedding and LM head.
        limits: What a shard reserves and compiles.
        num_programs: Programs that a shard compiles.
    """

    kinds: tuple[LayerPlan, ...]
    ends: EndsPlan
    limits: EngineLimits
    num_programs: int
    _kind_of: Mapping[int, LayerPlan] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        kind_of = {layer: kind for kind in self.kinds for layer in kind.layers}
        object.__setattr__(self, "_kind_of", kind_of)

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self._kind_of)

    @property
    def whole(self) -> RangePlan:
        """What one shard of all layers takes."""
        return self.plan_range(LayerRange(0, self.num_layers))

    def plan_range(self, layers: LayerRange) -> RangePlan:
        """Return what the shard of ``layers`` takes."""
        kinds = [self._kind_of[layer] for layer in range(layers.start, layers.stop)]
        is_tail = layers.stop == self.num_layers
        return RangePlan(
            weights=sum(kind.weights for kind in kinds) + self._end_weights(layers),
            kv=self._kv_bytes(sum(kind.kv_per_token for kind in kinds)),
            bank=self.ends.bank * is_tail,
            workspace=max(self.ends.sampling * is_tail, *(kind.workspace for kind in kinds)),
            runtime=RUNTIME_BASE_BYTES + PROGRAM_BYTES * len(layers) * self.num_programs,
        )

    def _kv_bytes(self, token_bytes: int) -> int:
        """Return the bytes of whole pages that a cache of ``token_bytes`` a token has."""
        format_ = PageFormat(page_tokens=self.limits.page_tokens, token_bytes=token_bytes)
        return kv_bytes(self.limits, format_) // format_.page_bytes * format_.page_bytes

    def _end_weights(self, layers: LayerRange) -> int:
        is_head, is_tail = layers.start == 0, layers.stop == self.num_layers
        if is_head and is_tail:
            return self.ends.both
        return self.ends.embedding * is_head + self.ends.head * is_tail

    def layers_that_fit(self, memory_bytes: int, *, start: int = 0) -> int:
        """Return how many layers from ``start`` on a machine of that memory can hold."""
        fitting = 0
        for stop in range(start + 1, self.num_layers + 1):
            if self.plan_range(LayerRange(start, stop)).needed > memory_bytes:
                break
            fitting = stop - start
        return fitting

    def place(self, memories: Iterable[int]) -> list[LayerRange | None]:
        """Give each machine in turn as many of the layers that are left as fit.

        Returns:
            The range of each machine; None for one that is not needed or too small.
        """
        start, placed = 0, list[LayerRange | None]()
        for memory_bytes in memories:
            count = self.layers_that_fit(memory_bytes, start=start)
            placed.append(LayerRange(start, start + count) if count else None)
            start += count
        return placed

    def machines_needed(self, memory_bytes: int, *, start: int = 0) -> int | None:
        """Return how many machines of that memory hold the layers from ``start`` on.

        Returns:
            None when some layer fits no such machine.
        """
        machines = 0
        while start < self.num_layers:
            count = self.layers_that_fit(memory_bytes, start=start)
            if count == 0:
                return None
            start += count
            machines += 1
        return machines


def plan_model(config: ModelConfig, spec: ShardSpec) -> ModelPlan:
    """Plan a model for each of the devices of its shards; reads and allocates no weights.

    Args:
        config: What its config.json says.
        spec: How its shards would hold it, and for how much they would make room.
    """
    use_compilation_cache(programs_folder())
    numerics = Numerics.of(spec.dtype, spec.quantization, devices=spec.devices)
    planner = _Planner(config, numerics, spec.limits)
    kinds = planner.plan_kinds()
    return ModelPlan(
        kinds=kinds,
        ends=planner.plan_ends(),
        limits=spec.limits,
        num_programs=len(planner.whole.all) + 1,
    )


class _Planner:
    """Builds abstract shards of a model and measures them."""

    def __init__(self, config: ModelConfig, numerics: Numerics, limits: EngineLimits) -> None:
        self._config = config
        self._numerics = numerics
        self._limits = limits
        self.whole = self._programs(LayerRange(0, config.num_layers))

    def plan_kinds(self) -> tuple[LayerPlan, ...]:
        """Plan the layers, with those that hold the same arrays counted once."""
        kinds: defaultdict[tuple[_LayerLeaves, tuple[CacheShape, ...]], list[int]]
        kinds = defaultdict(list)
        for layer, leaves in enumerate(self._leaves_of_layers()):
            kinds[leaves, self._config.cache_shapes(layer)].append(layer)
        workspaces = self._workspaces(list(kinds.values()))
        return tuple(
            LayerPlan(
                layers=tuple(layers),
                weights=_size(leaf for _, leaf in leaves),
                kv_per_token=self._kv_per_token(layers[0]),
                workspace=workspace,
            )
            for ((leaves, _), layers), workspace in zip(kinds.items(), workspaces, strict=True)
        )

    def plan_ends(self) -> EndsPlan:
        last = self._config.num_layers - 1
        head, tail = self._programs(LayerRange(0, 1)), self._programs(LayerRange(last, last + 1))
        return EndsPlan(
            embedding=_end_size(head, "embed_tokens"),
            head=_end_size(tail, "norm", "lm_head"),
            both=_end_size(self.whole, "embed_tokens", "norm", "lm_head"),
            sampling=tail.workspace_bytes(max(self.whole.all, key=_sampling_size)),
            bank=bank_bytes(self._config.vocab_size),
        )

    def _leaves_of_layers(self) -> list[_LayerLeaves]:
        leaves: list[list[tuple[ParameterPath, jax.ShapeDtypeStruct]]]
        leaves = [[] for _ in range(self._config.num_layers)]
        for (module, *rest), leaf in self.whole.parameters.items():
            if module == "layers":
                number, *path = rest
                leaves[int(number)].append((tuple(path), leaf))
        return [tuple(own) for own in leaves]

    def _kv_per_token(self, layer: int) -> int:
        layers, dtype = LayerRange(layer, layer + 1), self._numerics.compute
        devices = self._numerics.devices
        format_ = page_format(self._config, layers, page_tokens=1, dtype=dtype, devices=devices)
        return format_.token_bytes

    def _workspaces(self, kinds: Sequence[Sequence[int]]) -> list[int]:
        """Return for some equal layers at a time the temporaries of their largest program.

        It is measured at the first of them, which samples only where it is the only one.
        """
        firsts = [self._programs(LayerRange(first, first + 1)) for first, *_ in kinds]
        longest = max(self.whole.all, key=lambda program: program.tokens)
        with ThreadPoolExecutor() as pool:  # XLA compiles without holding Python's lock
            return list(pool.map(partial(_workspace, longest), firsts))

    def _programs(self, layers: LayerRange) -> Programs:
        return Programs(
            self._config,
            layers,
            numerics=self._numerics,
            limits=self._limits,
            num_pages=2,  # temporaries do not grow with the cache
        )


def _workspace(program: Program, programs: Programs) -> int:
    return programs.workspace_bytes(program)


def _sampling_size(program: Program) -> tuple[int, int]:
    return sampled_rows(step_shape(program)), program.tokens


def _end_size(programs: Programs, *modules: str) -> int:
    return _size(leaf for path, leaf in programs.parameters.items() if path[0] in modules)


def _size(arrays: Iterable[jax.ShapeDtypeStruct]) -> int:
    return sum(map(device_bytes, arrays))
