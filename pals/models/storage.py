"""Checkpoints as plain weights, whatever format their matrices are stored in.

Tensors of one quantised matrix, such as ``q_proj.qweight``, ``.qzeros`` and ``.scales``,
become one *logical* weight ``q_proj.weight`` [out, in] that is decoded by blocks of rows.
A checkpoint with half of a matrix is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from pals.errors import CorruptModel
from pals.models.config import QuantizationConfig, StorageMethod
from pals.models.stored import Fp8Weight, Mxfp4Weight, PlainWeight, StoredTensor, StoredWeight
from pals.models.stored_words import AwqWeight, GptqWeight

Parts = Mapping[str, str]
"""The tensors of one logical weight by the part they play, such as ``qzeros``."""

PLAIN = "weight"
MAX_SHOWN = 4


@dataclass(frozen=True, slots=True)
class _Layout:
    """How a format names the tensors of a matrix.

    Attributes:
        separator: What stands between the matrix's name and the part.
        logical: The part after which the logical weight is named.
        required: Alternatives for each part that must be there.
        optional: Parts that may be there. Scales of activations are among them, since
            activations are not quantised in the checkpoint's way.
    """

    separator: str
    logical: str
    required: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...] = ()

    @property
    def parts(self) -> frozenset[str]:
        """Parts whose presence makes a matrix one of this format."""
        every = {part for parts in self.required for part in parts} | set(self.optional)
        return frozenset(every - {PLAIN})


_LAYOUTS: Mapping[StorageMethod, _Layout] = MappingProxyType(
    {
        "fp8": _Layout(
            separator=".",
            logical="weight",
            required=(("weight",), ("weight_scale_inv", "weight_scale")),
            optional=("activation_scale", "input_scale"),
        ),
        "awq": _Layout(
            separator=".", logical="weight", required=(("qweight",), ("qzeros",), ("scales",))
        ),
        "gptq": _Layout(
            separator=".",
            logical="weight",
            required=(("qweight",), ("qzeros",), ("scales",)),
            optional=("g_idx",),
        ),
        "mxfp4": _Layout(
            separator="_", logical="blocks", required=(("blocks",), ("scales",))
        ),
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Storage:
    """The logical weights of a checkpoint, by the names of its tensors alone.

    Attributes:
        source: Named in errors.
        quantization: None for a checkpoint of plain weights.
        parts: The tensors of each logical weight.
    """

    source: Path
    quantization: QuantizationConfig | None
    parts: Mapping[str, Parts]

    @classmethod
    def of(
        cls, quantization: QuantizationConfig | None, tensors: Collection[str], source: Path
    ) -> Storage:
        """Group the names of a checkpoint's tensors.

        Raises:
            CorruptModel: A part of a matrix is missing, or stands there twice.
        """
        if quantization is None:
            return cls(source, None, {name: {PLAIN: name} for name in tensors})
        layout = _LAYOUTS[quantization.method]
        matrices = dict(_matrices(layout, set(tensors)))
        problems = [p for name, parts in matrices.items() for p in _problems(layout, name, parts)]
        owned = {tensor for parts in matrices.values() for tensor in parts.values()}
        logical = {name + layout.separator + layout.logical: p for name, p in matrices.items()}
        plain = {name: {PLAIN: name} for name in tensors if name not in owned}
        problems += [
            f"`{name}` stands beside its quantised form" for name in logical.keys() & plain
        ]
        if problems:
            more = f"; and {len(problems) - MAX_SHOWN} more" if len(problems) > MAX_SHOWN else ""
            raise CorruptModel(source=source, problem="; ".join(problems[:MAX_SHOWN]) + more)
        return cls(source, quantization, plain | logical)

    @property
    def names(self) -> set[str]:
        """The logical weights."""
        return set(self.parts)

    def tensors(self, name: str) -> tuple[str, ...]:
        """Return the tensors that a logical weight is stored in."""
        return tuple(self.parts[name].values())

    def weight(self, name: str, tensors: Mapping[str, StoredTensor]) -> StoredWeight:
        """Return a logical weight.

        Args:
            name: Of the weight.
            tensors: At least those that `tensors` names.

        Raises:
            CorruptModel: Shapes or dtypes of its tensors do not fit each other.
            UnsupportedModel: A plain weight has a dtype that is not read.
        """
        parts = {part: tensors[tensor] for part, tensor in self.parts[name].items()}
        if self.quantization is None or parts.keys() == {PLAIN}:
            return PlainWeight.of(name, parts)
        return _WEIGHTS[self.quantization.method].of(name, parts, self.quantization)


_WEIGHTS: Mapping[StorageMethod, type[Fp8Weight | AwqWeight | GptqWeight | Mxfp4Weight]] = (
    MappingProxyType({"fp8": Fp8Weight, "awq": AwqWeight, "gptq": GptqWeight, "mxfp4": Mxfp4Weight})
)


def _matrices(layout: _Layout, tensors: set[str]) -> Iterator[tuple[str, Parts]]:
    """Yield the name of each quantised matrix and its tensors by their parts."""
    found: dict[str, dict[str, str]] = {}
    for tensor in sorted(tensors):
        name, separator, part = tensor.rpartition(layout.separator)
        if separator and part in layout.parts:
            found.setdefault(name, {})[part] = tensor
    for name, parts in found.items():
        weight = f"{name}{layout.separator}{PLAIN}"
        if (PLAIN,) in layout.required and weight in tensors:
            parts[PLAIN] = weight
        yield name, parts


def _problems(layout: _Layout, name: str, parts: Parts) -> Iterator[str]:
    for choices in layout.required:
        present = [part for part in choices if part in parts]
        beside = next(iter(parts.values()))
        if not present:
            yield f"`{name}{layout.separator}{choices[0]}` is missing beside `{beside}`"
        elif len(present) > 1:
            yield f"`{parts[present[0]]}` and `{parts[present[1]]}` exclude each other"
