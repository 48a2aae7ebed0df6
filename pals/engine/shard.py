"""One machine's slice of a model.

A `Shard` is called from one thread at a time. It trusts no caller with inputs, which XLA
would silently clamp where they are out of range; which rows run, and on which pages, is the
word of `pals.engine.batcher`, whose steps it runs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np
import numpy.typing as npt

from pals.engine.arrays import StepArrays, tokens_of
from pals.engine.bank import (
    Bank,
    bank_bytes,
    build_bank,
    count_tokens,
    reset_slot,
    set_allowed,
    warm_bank,
)
from pals.engine.bank_slots import BankSlots
from pals.engine.batch import BatchRules, Step
from pals.engine.batcher import Batcher
from pals.engine.buckets import BatchLimits, Buckets, Program, check_batch_limits
from pals.engine.budget import RUNTIME_BASE_BYTES, choose_kv_bytes
from pals.engine.cache import build_cache, kv_bytes, page_format
from pals.engine.compile_cache import programs_folder, use_compilation_cache
from pals.engine.memory import find_memory
from pals.engine.pacing import StepCosts
from pals.engine.pages import SCRATCH_PAGE, PageCopy, PageFormat, PagePool
from pals.engine.prefix import PrefixScope
from pals.engine.sampling_rows import (
    RowSampling,
    build_sampling_rows,
    check_sampling,
    needs_slot,
)
from pals.engine.stepping import Leaves, StepArguments, sampled_rows, step_shape
from pals.engine.steps import COPIES, CompiledProgram, Programs
from pals.engine.work import AllowedTokens, PenaltyHistory, Sampled, StepOutput
from pals.errors import InvalidConfig, InvalidStep, LayersOutsideModel
from pals.models.build import AbstractModel
from pals.models.config import ModelConfig
from pals.models.decoder import Cache
from pals.models.kernels.choice import choose_attention
from pals.models.loading import LoadedParameters, load_shard_parameters
from pals.models.numerics import Numerics
from pals.models.snapshot import Snapshot
from pals.models.spread import device_bytes
from pals.types import (
    DEFAULT_QUANTIZATION,
    AttentionChoice,
    Dtype,
    EngineLimits,
    LayerRange,
    Quantization,
    Sampling,
    ShardSpec,
)

_log = logging.getLogger(__name__)

MAX_SESSIONS = 4096

LONG_RUN_S = 1.0
"""A program that takes longer is run once in warm-up: planning is a small part of it then."""

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Bytes that a shard holds on each of its devices."""

    weights: int
    kv: int
    bank: int


class Shard:
    """The layers ``layers`` of a model, their KV cache, and the steps over them.

    Attributes:
        config: The whole model's configuration.
        layers: The layers held here.
        dtype: In what the layers' matrices are held, which decides the dtype in which
            hidden states come and go.
        layer_hashes: SHA-256 of the source bytes of each layer.
        limits: What is reserved and compiled.
        page_format: The size of a page of the cache.
        kv_bytes: Of the cache on each device.
        is_head: Takes token ids instead of hidden states.
        is_tail: Returns sampled tokens instead of hidden states.
    """

    def __init__(
        self,
        *,
        config: ModelConfig,
        layers: LayerRange,
        spec: ShardSpec,
        numerics: Numerics,
        programs: Programs,
        loaded: LoadedParameters,
    ) -> None:
        self.config = config
        self.layers = layers
        self.dtype: Dtype = spec.dtype
        self._spec = spec
        self._numerics = numerics
        self.limits = spec.limits
        self.page_format = _page_format(config, layers, spec.limits, numerics)
        self.kv_bytes = kv_bytes(spec.limits, self.page_format)
        self.is_head = layers.start == 0
        self.is_tail = layers.stop == config.num_layers
        self._programs = programs
        self._leaves: Leaves = loaded.leaves
        self.layer_hashes = loaded.layer_hashes
        self._seconds: dict[Program, float] = {}
        self._empty_token = self._build_empty_token()
        self._arrays = {p: StepArrays(p, self._empty_token) for p in programs.all}
        self.reset()

    @classmethod
    def load(
        cls,
        snapshot: Snapshot,
        layers: LayerRange,
        *,
        dtype: Dtype,
        limits: EngineLimits,
        quantization: Quantization = DEFAULT_QUANTIZATION,
        devices: int = 1,
        attention: AttentionChoice = "auto",
    ) -> Shard:
        """Read the weights of ``layers`` to the device and reserve the cache.

        Several devices divide each layer among them (`pals.models.spread`). Which
        ``attention`` was chosen, and why, is logged.

        Raises:
            TooFewDevices: This machine has fewer.
            CannotDivide: The model cannot be divided among so many.
            LayersOutsideModel: The model has fewer layers.
            InvalidConfig: A limit is out of range, or beyond the model's own context, or the
                attention that was asked for cannot be used here.
            CorruptModel: The weights do not fit the config.
            UnsupportedModel: The weights have a dtype that is not read.
        """
        config = snapshot.config
        if layers.stop > config.num_layers:
            raise LayersOutsideModel(layers=layers, num_layers=config.num_layers)
        check_limits(limits, config)
        use_compilation_cache(programs_folder())
        numerics = Numerics.of(dtype, quantization, devices=devices)
        kinds = config.attention[layers.start : layers.stop]
        chosen = choose_attention(attention, kinds, numerics, limits.page_tokens)
        _log.info("attention of layers %s by %s: %s", layers, chosen.kernel, chosen.reason)
        numerics = replace(numerics, attention=chosen.kernel)
        programs = build_programs(config, layers, numerics=numerics, limits=limits)
        loaded = load_shard_parameters(snapshot, layers, numerics, programs.parameters)
        return cls(
            config=config,
            layers=layers,
            spec=ShardSpec(
                dtype=dtype,
                limits=limits,
                quantization=quantization,
                devices=devices,
                attention=attention,
            ),
            numerics=numerics,
            programs=programs,
            loaded=loaded,
        )

    # --- what it is ------------------------------------------------------------------

    @property
    def spec(self) -> ShardSpec:
        """All of what was asked for, with the bytes that the cache has."""
        return replace(self._spec, limits=replace(self.limits, kv_bytes=self.kv_bytes))

    @property
    def programs(self) -> tuple[Program, ...]:
        """All programs that its steps may be."""
        return self._programs.all

    def memory_bytes(self) -> MemoryUse:
        """Return the bytes of weights, cache, and the sampler's bank on each device."""
        return MemoryUse(
            weights=sum(map(device_bytes, self._leaves)),
            kv=sum(map(device_bytes, jax.tree.leaves(self._cache))),
            bank=sum(map(device_bytes, self._bank or ())),
        )

    def make_batcher(self, manifest: bytes, rules: BatchRules | None = None) -> Batcher:
        """Return a batcher that plans steps of this shard, with no session yet.

        Args:
            manifest: Of the model, 32 bytes.
            rules: Who gives way; those of the limits when left out.
        """
        scope = PrefixScope(
            manifest=manifest,
            layers=self.layers,
            dtype=self.dtype,
            kv_dtype=self._numerics.compute.name,
        )
        pool = PagePool(self.page_format, budget_bytes=self.kv_bytes, scope=scope)
        limits = self.limits
        rules = rules or BatchRules(
            max_sessions=limits.max_sessions, prefill_share=limits.prefill_share
        )
        buckets = Buckets(BatchLimits.of(limits))
        return Batcher(buckets, pool, rules, StepCosts(self._seconds))

    # --- warm-up ---------------------------------------------------------------------

    def warmup(
        self, on_program: Callable[[CompiledProgram], None] = lambda _: None
    ) -> list[CompiledProgram]:
        """Compile every program that the limits allow; nothing is compiled afterwards.

        Each is run too: on CPU, XLA plans matrix products only when a program first runs,
        which takes as long as twenty steps of decode. Other threads compile, or read what
        was compiled before, while this one runs what is ready; how long a step takes is
        measured when they have ended.

        Args:
            on_program: Told of each program when it has run.
        """
        compiled = [self._programs.compile_copy()]
        self._copy((PageCopy(SCRATCH_PAGE, SCRATCH_PAGE),))
        on_program(compiled[0])
        if self._bank is not None:
            self._bank = warm_bank(self._bank)
        for program, built in self._programs.compile_all():
            ran = replace(built, run_s=self._time(program))
            self._seconds[program] = ran.run_s
            compiled.append(ran)
            on_program(ran)
        for program, first_s in self._seconds.items():
            if first_s < LONG_RUN_S:
                self._seconds[program] = self._time(program)
        return compiled

    def _time(self, program: Program) -> float:
        """Run a program over the scratch page; return how long it takes, in seconds."""
        arrays = self._arrays[program]
        arrays.fill_warm(self.limits.max_context_tokens)
        samplings = [RowSampling(Sampling())] * sampled_rows(step_shape(program))
        started = time.perf_counter()
        self._call(program, arrays, samplings)
        return time.perf_counter() - started

    # --- sampling --------------------------------------------------------------------

    def open_sampling(self, sampling: Sampling, history: PenaltyHistory | None) -> RowSampling:
        """Return how the steps sample a session, having made room for what they keep of it.

        Args:
            sampling: What the driver asked for.
            history: Prompt and answer so far, which penalties look at, and whether tokens are
                masked.

        Raises:
            InvalidStep: A value or token id is out of its range.
            PenaltySlotsTaken: The bank is full.
        """
        check_sampling(sampling, self.config.vocab_size)
        tokens, answered, is_masked = history or PenaltyHistory(np.zeros(0, np.int32), 0)
        if self._bank is None or not (is_masked or needs_slot(sampling)):
            return RowSampling(sampling)
        prompt, answer = np.split(tokens, [len(tokens) - answered])
        slot = self._slots.take()
        try:
            self._bank = reset_slot(self._bank, slot, sampling, prompt=prompt, answer=answer)
        except InvalidStep:
            self._slots.give_back(slot)
            raise
        return RowSampling(sampling, slot)

    def close_sampling(self, row_sampling: RowSampling) -> None:
        """Give a session's room in the bank to others."""
        self._slots.give_back(row_sampling.slot)

    def set_allowed(self, row_sampling: RowSampling, allowed: AllowedTokens) -> None:
        """Let a session that was opened as masked sample only some tokens from now on.

        Raises:
            InvalidStep: None is allowed, or they are not as many bits as the vocabulary.
        """
        assert self._bank is not None
        assert row_sampling.slot, "its session was not opened as masked"
        self._bank = set_allowed(self._bank, row_sampling.slot, allowed)

    def count_accepted(self, row_sampling: RowSampling, tokens: Sequence[int]) -> None:
        """Count tokens of a verified draft that are now part of the answer.

        Raises:
            InvalidStep: A token id is out of range.
        """
        if self._bank is not None and row_sampling.slot:
            slots = [row_sampling.slot] * len(tokens)
            self._bank = count_tokens(self._bank, slots, tokens)

    # --- steps -----------------------------------------------------------------------

    def check_inputs(self, inputs: Array) -> None:
        """Raise unless rows of ``inputs`` can be computed; may be called on any thread.

        Args:
            inputs: Token ids [T] int32 at the head, hidden states [T, D] elsewhere.

        Raises:
            InvalidStep: Their shape or dtype is another, or a token id is out of range.
        """
        empty = self._empty_token
        if inputs.dtype != empty.dtype or inputs.ndim == 0 or inputs.shape[1:] != empty.shape:
            raise InvalidStep(
                problem=f"inputs are {inputs.dtype} {list(inputs.shape)} instead of "
                f"{empty.dtype} {['tokens', *empty.shape]}"
            )
        if not len(inputs):
            raise InvalidStep(problem="a row of no tokens")
        if self.is_head and not (inputs.min() >= 0 and inputs.max() < self.config.vocab_size):
            raise InvalidStep(problem=f"a token id is not in [0, {self.config.vocab_size})")

    def run(
        self,
        step: Step,
        inputs: Sequence[Array],
        samplings: Sequence[RowSampling | None],
    ) -> StepOutput:
        """Run a step that was planned, and wait for its result.

        Any failure takes the cache along: whoever planned it has to begin anew, with `reset`.

        Args:
            step: From `Batcher.plan`.
            inputs: Of each of `Step.all_rows`, as `check_inputs` takes them.
            samplings: Of each of them, how the tail samples; None for a chunk that is not
                the last one of its prompt unless that is pooled, and at every other shard.
        """
        arrays = self._arrays[step.program]
        firsts = arrays.fill(step, inputs)
        self._copy(step.copies)
        rows = step.all_rows
        if not self.is_tail:
            hidden = self._call(step.program, arrays, ())
            assert isinstance(hidden, np.ndarray)
            return StepOutput(hidden=hidden[tokens_of(firsts, rows)], sampled=None)
        places, padded = _place_samplings(step, firsts, samplings)
        sampled = self._call(step.program, arrays, padded)
        assert isinstance(sampled, Sampled)
        pooled = None
        if step.chunk is not None and _pools(samplings[-1]):
            pooled = np.asarray(self._pooled)
        return StepOutput(hidden=None, sampled=_take(sampled, places), pooled=pooled)

    def _call(
        self, program: Program, arrays: StepArrays, samplings: Sequence[RowSampling | None]
    ) -> Array | Sampled:
        rows = None
        if self.is_tail:
            rows = build_sampling_rows(samplings, sampled_rows(step_shape(program)))
        arguments = StepArguments(
            self._leaves, self._cache, self._bank, arrays.inputs, arrays.tables, rows
        )
        run = self._programs.get(program)
        output, self._cache, self._bank, self._pooled = run(arguments)
        return jax.tree.map(np.asarray, output)

    def _copy(self, copies: Sequence[PageCopy]) -> None:
        run = self._programs.get_copy() if copies else None
        for first in range(0, len(copies), COPIES):
            assert run is not None
            some = copies[first : first + COPIES]
            sources, targets = np.zeros((2, COPIES), np.int32)
            sources[: len(some)] = [copy.source for copy in some]
            targets[: len(some)] = [copy.target for copy in some]
            self._cache = run(self._cache, sources, targets)

    def reset(self) -> None:
        """Reserve an empty cache and bank: a step that failed took them along."""
        self._cache: Cache = ()  # frees what is left of the old one, which both may not fit
        self._cache = build_cache(self._programs.cache)
        self._bank: Bank | None = None
        if self.is_tail:
            self._bank = build_bank(self.config.vocab_size, mesh=self._numerics.mesh)
        self._slots = BankSlots()
        self._pooled: jax.Array | None = None

    def _build_empty_token(self) -> Array:
        """Return one token of inputs."""
        if self.is_head:
            return np.zeros((), np.int32)
        return np.zeros(self.config.hidden_size, self._numerics.compute)


def _take(sampled: Sampled, places: npt.NDArray[np.int32]) -> Sampled:
    ids, logprobs, top_ids, top_logprobs = sampled
    return Sampled(ids[places], logprobs[places], top_ids[places], top_logprobs[places])


def _pools(row: RowSampling | None) -> bool:
    return row is not None and row.sampling.pooling


def _place_samplings(
    step: Step, firsts: Sequence[int], samplings: Sequence[RowSampling | None]
) -> tuple[npt.NDArray[np.int32], list[RowSampling | None]]:
    """Return which sampled tokens count, row after row, and how each of the step is sampled.

    Args:
        step: Its short rows sample after each of their tokens, the chunk after its last one.
        firsts: Where the first token of each of `Step.all_rows` stands.
        samplings: Of each of them; None for one that samples nothing.
    """
    padded: list[RowSampling | None] = [None] * sampled_rows(step_shape(step.program))
    places: list[int] = []
    for row, first, sampling in zip(step.all_rows, firsts, samplings, strict=True):
        if sampling is None:
            continue
        count = 1 if row is step.chunk else row.tokens
        # of a draft nobody knows yet which tokens are accepted
        each = sampling if count == 1 else sampling.as_draft()
        padded[first : first + count] = [each] * count
        places += range(first, first + count)
    return np.array(places, np.int32), padded


def with_cache_that_fits(
    limits: EngineLimits, config: ModelConfig, layers: LayerRange, spec: ShardSpec
) -> EngineLimits:
    """Return limits that name the bytes of the cache, by what this machine has free."""
    numerics = Numerics.of(spec.dtype, spec.quantization, devices=spec.devices)
    format_ = _page_format(config, layers, limits, numerics)
    parameters = AbstractModel.build(config, layers, numerics).parameters.values()
    weights = sum(map(device_bytes, parameters))
    is_host = numerics.platform == "cpu"
    memory = find_memory(spec.devices)
    bank = bank_bytes(config.vocab_size) if layers.stop == config.num_layers else 0
    left_bytes = memory.size_bytes - weights - bank - RUNTIME_BASE_BYTES * is_host
    chosen = choose_kv_bytes(limits, format_, left_bytes=left_bytes, is_host=is_host)
    return replace(limits, kv_bytes=chosen)


def build_programs(
    config: ModelConfig, layers: LayerRange, *, numerics: Numerics, limits: EngineLimits
) -> Programs:
    """Return the programs of a shard, none of them compiled yet."""
    format_ = _page_format(config, layers, limits, numerics)
    num_pages = kv_bytes(limits, format_) // format_.page_bytes
    return Programs(config, layers, numerics=numerics, limits=limits, num_pages=num_pages)


def _page_format(
    config: ModelConfig, layers: LayerRange, limits: EngineLimits, numerics: Numerics
) -> PageFormat:
    return page_format(
        config,
        layers,
        page_tokens=limits.page_tokens,
        dtype=numerics.compute,
        devices=numerics.devices,
    )


def check_limits(limits: EngineLimits, config: ModelConfig) -> None:
    """Raise unless a shard of the model can be built within ``limits``.

    Raises:
        InvalidConfig: It cannot.
    """
    check_batch_limits(BatchLimits.of(limits))
    most = config.max_position_embeddings
    checks = [
        ("max_sessions", limits.max_sessions, 1 <= limits.max_sessions <= MAX_SESSIONS,
         f"choose 1 to {MAX_SESSIONS}"),
        ("max_context_tokens", limits.max_context_tokens, limits.max_context_tokens <= most,
         f"choose 1 to {most}, the model's own context"),
        ("prefill_share", limits.prefill_share, 0 < limits.prefill_share < 1,
         "choose a part of the time, such as 0.25"),
    ]  # fmt: skip
    for name, value, holds, advice in checks:
        if not holds:
            raise InvalidConfig(source="shard", problem=f"{name} is {value}", advice=advice)
