# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""What compiled programs depend on: the machine, the versions, and the shard's shapes.

Both are flat tables, so that whoever compares them can say what differs.
"""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import jax
import msgspec

from pals import config as environment
from pals.engine.buckets import BatchLimits
from pals.models.config import ModelConfig
from pals.types import LayerRange, ShardSpec

MAX_SHOWN_CHARS = 80
_INSTRUCTIONS = re.compile(
    "sse|ssse|avx|amx|apx|fma|f16c|bmi|adx|aes|vaes|sha|gfni|pclmul|vpclmul|popcnt|movbe|abm|xop"
)
"""How the names of x86 features begin that are instructions which XLA may choose. Linux lists
others beside them, which differ between its versions."""
ABSENT = "not stated"


def machine_kind() -> dict[str, str]:
    """Return what programs of this machine depend on beside their shapes."""
    device = jax.local_devices()[0]
    kind = {
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "platform": device.platform,
        "runtime": " ".join(device.client.platform_version.split()),
        "device": device.device_kind,
        "devices": str(jax.local_device_count()),
        "XLA_FLAGS": environment.compiler_flags(),
    }
    return kind | _processor() if device.platform == "cpu" else kind


def shard_kind(config: ModelConfig, layers: LayerRange, spec: ShardSpec) -> dict[str, str]:
    """Return what the shapes of a shard's programs follow from."""
    canonical = msgspec.json.encode(config, order="deterministic")
    limits = asdict(BatchLimits.of(spec.limits))
    return {
        "model": f"{type(config).__name__} {hashlib.sha256(canonical).hexdigest()}",
        "layers": str(layers),
        "dtype": spec.dtype,
        **{name: str(value) for name, value in asdict(spec.quantization).items()},
        **{name: str(value) for name, value in limits.items()},
        "kv_bytes": str(spec.limits.kv_bytes),
        "devices of the shard": str(spec.devices),
        "attention": spec.attention,
    }


def differences(theirs: Mapping[str, str], ours: Mapping[str, str]) -> list[str]:
    """Return what differs between two tables, with both values, for people."""
    names = [*ours, *(name for name in theirs if name not in ours)]
    found = ((name, theirs.get(name, ABSENT), ours.get(name, ABSENT)) for name in names)
    return [_difference(*each) for each in found if each[1] != each[2]]


def _processor(root: Path = Path("/")) -> dict[str, str]:
    """Return for which processor XLA compiles on CPU: it uses every instruction there is."""
    try:
        lines = (root / "proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    first = dict[str, str]()
    for name, _, value in (line.partition(":") for line in lines):
        first.setdefault(name.strip(), value.strip())
    features = {f for f in first.get("flags", "").split() if _INSTRUCTIONS.match(f)}
    features.update(first.get("Features", "").split())  # ARM's
    return {
        "processor": f"{platform.machine()} {first.get('model name') or platform.processor()}",
        "processor features": " ".join(sorted(features)),
        "threads": str(environment.compute_threads()),
    }


def _difference(name: str, theirs: str, ours: str) -> str:
    if name == "processor features":
        lacking = " ".join(sorted({*theirs.split()} - {*ours.split()}))
        further = " ".join(sorted({*ours.split()} - {*theirs.split()}))
        return f"{name}: without {_short(lacking)} and with {_short(further)} here"
    return f"{name}: `{_short(theirs)}` there, `{_short(ours)}` here"


def _short(text: str) -> str:
    if not text:
        return "nothing"
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}…"
