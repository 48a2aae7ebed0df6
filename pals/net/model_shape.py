"""What the wire needs to know of a model: the shapes of what enters and leaves its layers."""

from __future__ import annotations

from dataclasses import dataclass

from pals.net.wire import FrameShape, hidden_shape, sampled_shape, tokens_shape
from pals.types import Dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What the wire needs to know of a model.

    Attributes:
        manifest: SHA-256 of the model's files, 32 bytes.
        num_layers: Decoder layers of the whole model.
        hidden_size: Elements of one token's hidden state.
        dtype: In what the weights are kept, which decides the dtype on the wire.
    """

    manifest: bytes
    num_layers: int
    hidden_size: int
    dtype: Dtype

    def input_of(self, start: int) -> FrameShape:
        """Return the shape of what enters at layer ``start``: ids at 0, else hidden states."""
        if start == 0:
            return tokens_shape(self.manifest)
        return hidden_shape(self.manifest, start, self.dtype, self.hidden_size)

    def output_of(self, stop: int) -> FrameShape:
        """Return the shape of what leaves before layer ``stop``; at the end, sampled ids."""
        if stop == self.num_layers:
            return sampled_shape(self.manifest, self.num_layers)
        return self.input_of(stop)
