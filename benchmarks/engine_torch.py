"""The same decoder in eager PyTorch: no more than what its layers need, with a static cache.

Its weights are random too, and it takes a vocabulary of its own head's size.
"""

from __future__ import annotations

import sys
import time

import msgspec
import torch
from torch.nn import functional

from benchmarks.engine_job import (
    MAX_ROWS,
    PREFILL_TOKENS,
    PROMPT_TOKENS,
    SHAPES,
    WARMUP_STEPS,
    Ask,
    Job,
    Ready,
    Took,
)
from benchmarks.line_child import serve
from benchmarks.random_models import Shape

POSITIONS = PROMPT_TOKENS + 64
ROPE_BASE = 500000.0
EPS = 1e-6
DRAWN_ROWS = 256


class Layer:
    """One layer, with the keys and values of every row."""

    def __init__(self, shape: Shape) -> None:
        hidden, wide, width = shape.hidden_size, shape.intermediate_size, shape.head_dim
        self._heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        self._width = width
        self._qkv = draw(sum(self._heads) * width, hidden)
        self._out = draw(hidden, shape.num_heads * width)
        self._gate_up = draw(2 * wide, hidden)
        self._down = draw(hidden, wide)
        self._norms = [torch.ones(hidden, dtype=torch.bfloat16) for _ in range(2)]
        self._head_norm = (
            torch.ones(width, dtype=torch.bfloat16) if shape.family == "qwen3" else None
        )
        held = (MAX_ROWS, shape.num_kv_heads, POSITIONS, width)
        self._keys = torch.zeros(held, dtype=torch.bfloat16)
        self._values = torch.zeros(held, dtype=torch.bfloat16)

    @property
    def weight_bytes(self) -> int:
        weights = (self._qkv, self._out, self._gate_up, self._down)
        return sum(weight.nbytes for weight in weights)

    def decode(self, x: torch.Tensor, position: int, turn: torch.Tensor) -> torch.Tensor:
        """Map [B, 1, D], the tokens at ``position`` of the first B rows."""
        queries, keys, values = self._project(x, turn)
        rows, end = len(x), position + 1
        self._keys[:rows, :, position] = keys[:, :, 0]
        self._values[:rows, :, position] = values[:, :, 0]
        held = self._keys[:rows, :, :end], self._values[:rows, :, :end]
        mixed = functional.scaled_dot_product_attention(queries, *held, enable_gqa=True)
        return self._finish(x, mixed)

    def prefill(self, x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        """Map [1, T, D], a prompt from its beginning, that nothing follows."""
        queries, keys, values = self._project(x, turn)
        mixed = functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, enable_gqa=True
        )
        return self._finish(x, mixed)

    def _project(
        self, x: torch.Tensor, turn: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        normed = functional.rms_norm(x, x.shape[-1:], self._norms[0], EPS)
        joined = functional.linear(normed, self._qkv)
        joined = joined.view(*x.shape[:2], -1, self._width).transpose(1, 2)
        queries, keys, values = joined.split(self._heads, dim=1)
        if self._head_norm is not None:
            queries = functional.rms_norm(queries, (self._width,), self._head_norm, EPS)
            keys = functional.rms_norm(keys, (self._width,), self._head_norm, EPS)
        return rotate(queries, turn), rotate(keys, turn), values

    def _finish(self, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        x = x + functional.linear(mixed.transpose(1, 2).flatten(2), self._out)
        normed = functional.rms_norm(x, x.shape[-1:], self._norms[1], EPS)
        gate, up = functional.linear(normed, self._gate_up).chunk(2, dim=-1)
        return x + functional.linear(functional.silu(gate) * up, self._down)


class Decoder:
    """All layers and the head."""

    def __init__(self, shape: Shape) -> None:
        self._layers = [Layer(shape) for _ in range(shape.num_layers)]
        self._head = draw(shape.vocab_size, shape.hidden_size)
        self._norm = torch.ones(shape.hidden_size, dtype=torch.bfloat16)
        self._turns = turns(max(PREFILL_TOKENS, POSITIONS), shape.head_dim)

    @property
    def weight_bytes(self) -> int:
        return self._head.nbytes + sum(layer.weight_bytes for layer in self._layers)

    def decode(self, tokens: torch.Tensor, position: int) -> torch.Tensor:
        """Return the next tokens [B, 1] after those at ``position``."""
        x = functional.embedding(tokens, self._head)
        for layer in self._layers:
            x = layer.decode(x, position, self._turns[:, position : position + 1])
        return self._sample(x)

    def prefill(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the token after the prompt [1, T]."""
        x = functional.embedding(tokens, self._head)
        for layer in self._layers:
            x = layer.prefill(x, self._turns[:, : tokens.shape[1]])
        return self._sample(x[:, -1:])

    def _sample(self, x: torch.Tensor) -> torch.Tensor:
        normed = functional.rms_norm(x, x.shape[-1:], self._norm, EPS)
        return functional.linear(normed, self._head).argmax(-1)


def draw(rows: int, columns: int) -> torch.Tensor:
    """Return a matrix of random rows in bf16; they repeat, which takes less time to make."""
    some = torch.randn(min(rows, DRAWN_ROWS), columns).mul_(columns**-0.5).to(torch.bfloat16)
    return some.repeat(-(-rows // len(some)), 1)[:rows].clone()


def turns(positions: int, width: int) -> torch.Tensor:
    """Return cosines and sines of each position, [2, positions, width / 2] in bf16."""
    angles = ROPE_BASE ** (-torch.arange(0, width, 2) / width)
    phases = torch.arange(positions)[:, None] * angles
    return torch.stack([phases.cos(), phases.sin()]).to(torch.bfloat16)


def rotate(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Turn the halves of each head of [B, N, T, H]."""
    first, second = x.chunk(2, dim=-1)
    cosine, sine = turn
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def time_decode(decoder: Decoder, ask: Ask) -> float:
    """Return the seconds of a step."""
    tokens = torch.ones(ask.rows, 1, dtype=torch.long)
    started_s = 0.0
    for number in range(WARMUP_STEPS + ask.steps):
        if number == WARMUP_STEPS:
            started_s = time.perf_counter()
        tokens = decoder.decode(tokens, PROMPT_TOKENS + number)
    return (time.perf_counter() - started_s) / ask.steps


def time_prefill(decoder: Decoder) -> float:
    """Return the seconds of a prompt."""
    tokens = torch.ones(1, PREFILL_TOKENS, dtype=torch.long)
    started_s = time.perf_counter()
    decoder.prefill(tokens)
    return time.perf_counter() - started_s


def main() -> None:
    """Answer the questions of standard input."""
    job = msgspec.json.decode(sys.argv[1], type=Job)
    torch.set_num_threads(job.threads)
    with torch.inference_mode():
        decoder = Decoder(SHAPES[job.shape])
        ready = Ready(device="cpu", weight_bytes=decoder.weight_bytes)

        def answer(ask: Ask) -> Ready | Took:
            match ask.kind:
                case "load":
                    return ready
                case "decode":
                    return Took(seconds=time_decode(decoder, ask))
                case "prefill":
                    return Took(seconds=time_prefill(decoder))

        serve(Ask, answer)


if __name__ == "__main__":
    main()
