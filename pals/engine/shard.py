"""One machine's slice of a model.

A `Shard` is called from one thread at a time. It trusts no caller: XLA would silently
clamp a token id, slot or position that is out of range, so each is checked before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from pals.config import cache_dir
from pals.engine.cache import MIN_CHUNK_BUCKET, SlotLengths, build_cache, cache_positions
from pals.engine.sampler import SamplingRows, build_sampling_rows
from pals.engine.steps import (
    CompiledProgram,
    Leaves,
    ProgramKey,
    Programs,
    batch_buckets,
    chunk_buckets,
    use_compilation_cache,
)
from pals.errors import InvalidConfig, InvalidStep, LayersOutsideModel
from pals.models.config import ModelConfig
from pals.models.configs.moe import SparseConfig
from pals.models.decoder import Cache
from pals.models.loading import LoadedParameters, load_shard_parameters
from pals.models.numerics import Numerics
from pals.models.snapshot import Snapshot
from pals.types import (
    DEFAULT_QUANTIZATION,
    Dtype,
    EngineLimits,
    LayerRange,
    Quantization,
    Sampling,
)

MAX_SESSIONS = 256
MAX_CHUNK_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Device bytes that a shard holds."""

    weights: int
    kv: int


class Shard:
    """The layers ``layers`` of a model, their KV cache, and the steps over them.

    Attributes:
        config: The whole model's configuration.
        layers: The layers held here.
        dtype: In what the layers' matrices are held, which decides the dtype in which
            hidden states come and go.
        layer_hashes: SHA-256 of the source bytes of each layer.
        limits: Slots, context and chunk that are reserved and compiled for.
        is_head: Takes token ids instead of hidden states.
        is_tail: Returns sampled tokens instead of hidden states.
    """

    def __init__(
        self,
        *,
        config: ModelConfig,
        layers: LayerRange,
        dtype: Dtype,
        numerics: Numerics,
        limits: EngineLimits,
        programs: Programs,
        loaded: LoadedParameters,
    ) -> None:
        self.config = config
        self.layers = layers
        self.dtype: Dtype = dtype
        self._numerics = numerics
        self.limits = limits
        self.is_head = layers.start == 0
        self.is_tail = layers.stop == config.num_layers
        self._programs = programs
        self._leaves: Leaves = loaded.leaves
        self.layer_hashes = loaded.layer_hashes
        self._reset()

    @classmethod
    def load(
        cls,
        snapshot: Snapshot,
        layers: LayerRange,
        *,
        dtype: Dtype,
        limits: EngineLimits,
        quantization: Quantization = DEFAULT_QUANTIZATION,
        split_experts: bool = False,
    ) -> Shard:
        """Read the weights of ``layers`` to the device and reserve the cache.

        With ``split_experts`` the experts of each layer are spread over all local devices,
        and everything else is whole on each; a model without experts stays on one.

        Raises:
            LayersOutsideModel: The model has fewer layers.
            InvalidConfig: A limit is out of range, or beyond the model's own context.
            CorruptModel: The weights do not fit the config.
            UnsupportedModel: The weights have a dtype that is not read.
        """
        config = snapshot.config
        if layers.stop > config.num_layers:
            raise LayersOutsideModel(layers=layers, num_layers=config.num_layers)
        check_limits(limits, config)
        use_compilation_cache(cache_dir() / "xla")
        has_experts = isinstance(config, SparseConfig)
        numerics = Numerics.of(dtype, quantization, split_experts=split_experts and has_experts)
        programs = Programs(config, layers, numerics=numerics, limits=limits)
        loaded = load_shard_parameters(snapshot, layers, numerics, programs.parameters)
        return cls(
            config=config,
            layers=layers,
            dtype=dtype,
            numerics=numerics,
            limits=limits,
            programs=programs,
            loaded=loaded,
        )

    def warmup(self) -> list[CompiledProgram]:
        """Compile every program that the limits allow; nothing is compiled afterwards.

        Those that a session begins with are run once: on CPU, XLA plans matrix products
        only when a program first runs, which takes as long as twenty steps of decode.
        """
        compiled = [
            self._programs.compile(key, self._leaves, self._cache)
            for key in self._programs.all_keys()
        ]
        self._run_first_steps()
        return compiled

    def _run_first_steps(self) -> None:
        """Run a first chunk and a first batch of each size, and forget them."""
        limits, sampling = self.limits, Sampling()
        for size in chunk_buckets(limits):
            inputs = self._zeros(min(size, limits.max_context_tokens))
            self.prefill(slot=0, position=0, inputs=inputs, sampling=sampling)
        for size in batch_buckets(limits):
            rows = min(size, limits.max_sessions)
            self.decode(
                slots=range(rows),
                positions=[0] * rows,
                inputs=self._zeros(rows),
                samplings=[sampling] * rows,
            )
        self._lengths = SlotLengths(limits)

    def memory_bytes(self) -> MemoryUse:
        """Return the device bytes of weights and cache."""
        return MemoryUse(
            weights=sum(leaf.nbytes for leaf in self._leaves),
            kv=sum(array.nbytes for array in jax.tree.leaves(self._cache)),
        )

    def prefill(
        self, *, slot: int, position: int, inputs: np.ndarray, sampling: Sampling | None
    ) -> np.ndarray:
        """Run one chunk of one session.

        Position 0 begins a new session in the slot. A position below what the slot holds
        steps back to it.

        Args:
            slot: Below ``limits.max_sessions``.
            position: Of the chunk's first token.
            inputs: Token ids [T] int32 at the head, hidden states [T, D] elsewhere.
            sampling: How the tail samples after the chunk's last token; None samples nothing.

        Returns:
            Hidden states [T, D]; at the tail one token [1] int32, or [0] without sampling.

        Raises:
            InvalidStep: An argument is out of range.
        """
        tokens = self._check_inputs(inputs, self.limits.max_chunk_tokens)
        self._lengths.check(slot, position, tokens)
        rows = build_sampling_rows([] if sampling is None else [sampling], 1)
        key = self._programs.prefill_key(position, tokens)
        output = self._run(
            key,
            _pad(inputs, key.size),
            np.array([slot], np.int32),
            np.array([position], np.int32),
            np.array([tokens], np.int32),
            rows if self.is_tail else None,
        )
        self._lengths.advance(slot, position, tokens)
        if self.is_tail:
            return output if sampling is not None else output[:0]
        return output[:tokens]

    def decode(
        self,
        *,
        slots: Sequence[int],
        positions: Sequence[int],
        inputs: np.ndarray,
        samplings: Sequence[Sampling],
    ) -> np.ndarray:
        """Run one token of each of some sessions.

        Args:
            slots: Distinct.
            positions: Of each row's token.
            inputs: Token ids [B] int32 at the head, hidden states [B, D] elsewhere.
            samplings: One for each row; only the tail looks at them.

        Returns:
            Hidden states [B, D], or the next tokens [B] int32 at the tail.

        Raises:
            InvalidStep: An argument is out of range.
        """
        count = self._check_inputs(inputs, self.limits.max_sessions)
        if not count == len(slots) == len(positions) == len(samplings):
            raise InvalidStep(
                problem=f"{count} inputs, {len(slots)} slots, {len(positions)} positions and "
                f"{len(samplings)} samplings in one batch"
            )
        if len(set(slots)) != count:
            raise InvalidStep(problem=f"a slot stands twice in the batch {list(slots)}")
        for slot, position in zip(slots, positions, strict=True):
            self._lengths.check(slot, position, 1)
        key = self._programs.decode_key(count, max(positions))
        # Rows that only pad write to the margin of slot 0, which nobody attends to.
        idle = key.size - count
        output = self._run(
            key,
            _pad(inputs, key.size),
            np.array([*slots, *[0] * idle], np.int32),
            np.array([*positions, *[cache_positions(self.limits) - 1] * idle], np.int32),
            build_sampling_rows(samplings, key.size) if self.is_tail else None,
        )
        for slot, position in zip(slots, positions, strict=True):
            self._lengths.advance(slot, position, 1)
        return output[:count]

    def _run(
        self, key: ProgramKey, *arguments: np.ndarray | SamplingRows[np.ndarray] | None
    ) -> np.ndarray:
        """Run a program over the cache and wait for its result.

        Any failure empties every slot: the cache was given to the program, and is gone.
        """
        try:
            program = self._programs.get(key, self._leaves, self._cache)
            output, self._cache = program(self._leaves, self._cache, *arguments)
            return np.asarray(output)
        except Exception:  # XLA's errors have no common type; each is raised again
            self._reset()
            raise

    def _zeros(self, tokens: int) -> np.ndarray:
        if self.is_head:
            return np.zeros(tokens, np.int32)
        return np.zeros((tokens, self.config.hidden_size), self._numerics.compute)

    def _reset(self) -> None:
        """Reserve an empty cache."""
        self._lengths = SlotLengths(self.limits)
        self._cache: Cache = ()  # frees what is left of the old one, which both may not fit
        self._cache = build_cache(
            self.config,
            self.layers,
            limits=self.limits,
            dtype=self._numerics.compute,
            mesh=self._numerics.moe.mesh,
        )

    def _check_inputs(self, inputs: np.ndarray, most: int) -> int:
        """Return the number of tokens, having checked dtype, shape and range."""
        dtype = np.dtype(np.int32) if self.is_head else self._numerics.compute
        row_shape = () if self.is_head else (self.config.hidden_size,)
        if inputs.dtype != dtype or inputs.shape[1:] != row_shape or inputs.ndim == 0:
            raise InvalidStep(
                problem=f"inputs are {inputs.dtype} {list(inputs.shape)} instead of "
                f"{dtype} {['tokens', *row_shape]}"
            )
        if not 1 <= len(inputs) <= most:
            raise InvalidStep(problem=f"{len(inputs)} tokens in one step, which takes 1 to {most}")
        if self.is_head and not (inputs.min() >= 0 and inputs.max() < self.config.vocab_size):
            raise InvalidStep(problem=f"a token id is not in [0, {self.config.vocab_size})")
        return len(inputs)


def check_limits(limits: EngineLimits, config: ModelConfig) -> None:
    """Raise unless a shard of the model can be built within ``limits``.

    Raises:
        InvalidConfig: It cannot.
    """
    context = min(config.max_position_embeddings, limits.max_context_tokens)
    chunk = limits.max_chunk_tokens
    checks = [
        ("max_sessions", limits.max_sessions, 1 <= limits.max_sessions <= MAX_SESSIONS,
         f"choose 1 to {MAX_SESSIONS}"),
        ("max_context_tokens", limits.max_context_tokens, 1 <= limits.max_context_tokens == context,
         f"choose 1 to {config.max_position_embeddings}, the model's own context"),
        ("max_chunk_tokens", chunk,
         MIN_CHUNK_BUCKET <= chunk <= MAX_CHUNK_TOKENS and chunk & (chunk - 1) == 0,
         f"choose a power of two from {MIN_CHUNK_BUCKET} to {MAX_CHUNK_TOKENS}"),
    ]  # fmt: skip
    for name, value, holds, advice in checks:
        if not holds:
            raise InvalidConfig(source="shard", problem=f"{name} is {value}", advice=advice)


def _pad(inputs: np.ndarray, size: int) -> np.ndarray:
    """Append rows of zeros until there are ``size``."""
    padded = np.zeros((size, *inputs.shape[1:]), inputs.dtype)
    padded[: len(inputs)] = inputs
    return padded
