"""Exports the steps of a shard for accelerators, on a machine that has none."""

from dataclasses import replace

import jax
from jax.export import DisabledSafetyCheck, Exported, export
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pals.engine.buckets import Program
from pals.engine.stepping import step_shape
from pals.engine.steps import Programs
from pals.engine.whole import WholeSteps
from pals.models.config import ModelConfig
from pals.models.numerics import AttentionKernel, Numerics
from pals.types import DEFAULT_QUANTIZATION, Dtype, EngineLimits, LayerRange

DEVICES = {
    "gpu": AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda"),
    "tpu": AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu"),
}
"""Whom Pallas asks what it may use, where jax has no such device."""

TRITON = "__gpu$xla.gpu.triton"
"""What calls a kernel of Pallas on GPUs. Exports promise that other versions of XLA run them,
and this one does not; here they are looked at only."""

LIMITS = EngineLimits(
    max_rows=2, max_context_tokens=64, max_chunk_tokens=16, verify_tokens=1, page_tokens=16
)
MIXED = Program(rows=2, row_tokens=1, chunk_tokens=16, pages=4)
"""All that a step may have: rows and a chunk."""


def export_step(
    config: ModelConfig,
    layers: LayerRange,
    platform: str,
    dtype: Dtype,
    attention: AttentionKernel = "xla",
) -> Exported:
    """Export the step of a shard with rows and a chunk.

    Args:
        config: Of the model.
        layers: Of the shard.
        platform: ``gpu`` or ``tpu``, for which formulations are chosen as on such a machine.
        dtype: In which matrices are held.
        attention: Of its layers.
    """
    numerics = Numerics.of(dtype, replace(DEFAULT_QUANTIZATION, group_size=32))
    numerics = replace(numerics, platform=platform, attention=attention)
    programs = Programs(config, layers, numerics=numerics, limits=LIMITS, num_pages=9)
    assert MIXED in programs.all
    steps = programs._steps
    assert isinstance(steps, WholeSteps)
    device = DEVICES[platform]
    mesh = AbstractMesh((1,), ("one",), axis_types=(AxisType.Auto,), abstract_device=device)
    unchecked = [DisabledSafetyCheck.custom_call(TRITON)]
    arguments = programs._arguments(MIXED)
    step = steps.step(arguments, step_shape(MIXED))
    with jax.sharding.use_abstract_mesh(mesh):
        return export(step, platforms=[device.platform], disabled_checks=unchecked)(*arguments)
