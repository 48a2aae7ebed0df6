"""Takes checked values out of a parsed config.json, and remembers which were taken.

Both spellings are read: transformers 4 (``rope_theta``, ``rope_scaling``) and
transformers 5 (``rope_parameters``). A key that no family reads and that is not known to
be inert is refused by name rather than ignored: it could change the result.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar, cast

from pals.errors import CorruptModel, UnsupportedModel

MAX_LAYERS = 1024
MAX_HEADS = 1024
MAX_HEAD_DIM = 1024
MAX_HIDDEN_SIZE = 1 << 17
MAX_INTERMEDIATE_SIZE = 1 << 20
MAX_VOCAB_SIZE = 1 << 22
MAX_POSITIONS = 1 << 24
MAX_EXPERTS = 1 << 12
MAX_EOS_TOKENS = 64
MIN_NUMBER, MAX_NUMBER = 1e-18, 1e18
"""Between them two numbers have a product and a quotient in float32."""

INERT_KEYS = frozenset(
    {
        "_name_or_path",
        "attention_dropout",
        "bos_token_id",
        "cache_implementation",
        "dtype",
        "initializer_range",
        "pad_token_id",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "use_cache",
    }
)
"""Keys that say something about training, other programs, or the files only."""

MAX_SHOWN = 80

_SHORT = reprlib.Repr()
"""Neither the depth nor the size of a value decides what showing it costs."""
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = MAX_SHOWN

JsonObject = Mapping[str, object]
Choice = TypeVar("Choice", bound=str)


@dataclass(frozen=True, slots=True)
class ConfigReader:
    """One config.json, or a table inside it.

    Every method raises `CorruptModel` on a value that cannot be, and `UnsupportedModel`
    on one that is not implemented.
    """

    values: JsonObject
    source: str
    taken: set[str] = field(default_factory=set[str])

    def take(self, key: str) -> object:
        """Return the value of ``key``, or None."""
        self.taken.add(key)
        return self.values.get(key)

    def table(self, key: str) -> ConfigReader | None:
        """Return a reader of the table ``key``; None where it is null or absent."""
        value = self.take(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.corrupt(f"`{key}` is {shown(value)}, not a table")
        return ConfigReader(cast("JsonObject", value), f"{self.source}: {key}")

    def integer(self, key: str, most: int, *, default: int | None = None, least: int = 1) -> int:
        """Return an integer in [``least``, ``most``]; null and absent mean the default."""
        value = self.take(key)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.corrupt(f"`{key}` is {shown(value)}, not an integer of {least} or more")
        if value > most:
            raise self.unsupported(f"`{key}` is {shown(value)}, the most is {most}")
        return value

    def optional_integer(self, key: str, most: int) -> int | None:
        """Return an integer in [1, ``most``], or None where it is null or absent."""
        return None if self.take(key) is None else self.integer(key, most)

    def number(self, key: str, *, default: float | None = None) -> float:
        """Return a positive number; null and absent mean the default."""
        value = self.take(key)
        if value is None:
            value = default
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.corrupt(f"`{key}` is {shown(value)}, not a number")
        if not MIN_NUMBER <= value <= MAX_NUMBER:
            raise self.corrupt(f"`{key}` is {shown(value)}, not a positive number")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """Return a positive number, or None where it is null or absent."""
        return None if self.take(key) is None else self.number(key)

    def boolean(self, key: str, *, default: bool = False) -> bool:
        value = self.take(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.corrupt(f"`{key}` is {shown(value)}, not true or false")
        return value

    def choice(self, key: str, options: Mapping[str, Choice], *, default: str) -> Choice:
        """Return what ``options`` names the value of ``key``."""
        value = self.take(key)
        name = default if value is None else value
        if not isinstance(name, str) or name not in options:
            raise self.unsupported(f"`{key}` is {shown(value)}, not one of {', '.join(options)}")
        return options[name]

    def integers(self, key: str, most: int) -> tuple[int, ...]:
        """Return a list of integers in [0, ``most``); null and absent mean none."""
        items = self._items(key)
        if items is None:
            return ()
        if not all(_is_below(item, most) for item in items):
            raise self.corrupt(f"`{key}` is {shown(items)}, not integers below {most}")
        return tuple(cast("list[int]", items))

    def strings(self, key: str) -> tuple[str, ...] | None:
        """Return a list of strings, or None where it is null or absent."""
        items = self._items(key)
        if items is None:
            return None
        if not all(isinstance(item, str) for item in items):
            raise self.corrupt(f"`{key}` is {shown(items)}, not a list of strings")
        return tuple(cast("list[str]", items))

    def _items(self, key: str) -> list[object] | None:
        value = self.take(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(cast("list[object]", value)) > MAX_LAYERS:
            raise self.corrupt(f"`{key}` is {shown(cast('object', value))}, not a short list")
        return cast("list[object]", value)

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """Return one token id or a list of them; null and absent mean none."""
        value = self.take(key)
        if value is None:
            return ()
        ids = cast("list[object]", value) if isinstance(value, list) else [value]
        if len(ids) > MAX_EOS_TOKENS or not all(_is_below(i, vocab_size) for i in ids):
            raise self.corrupt(f"`{key}` is {shown(ids)}, not token ids below {vocab_size}")
        return tuple(cast("list[int]", ids))

    def expect(self, key: str, *allowed: object) -> None:
        """Raise unless ``key`` has one of these values, or is null or absent."""
        value = self.take(key)
        if value is not None and value not in allowed:
            wanted = ", ".join(shown(one) for one in allowed)
            raise self.unsupported(f"`{key}` is {shown(value)}; implemented is {wanted}")

    def refuse_unknown(self, *inert: str) -> None:
        """Raise when a key was not taken, is not inert, and is not null or false."""
        known = self.taken | INERT_KEYS | set(inert)
        unknown = sorted(
            str(key)
            for key, value in self.values.items()
            if key not in known and value is not None and value is not False
        )
        if unknown:
            raise self.unsupported(f"unknown keys {shown(unknown)}")

    def unsupported(self, problem: str) -> UnsupportedModel:
        return UnsupportedModel(source=self.source, problem=problem)

    def corrupt(self, problem: str) -> CorruptModel:
        return CorruptModel(source=self.source, problem=problem)


def _is_below(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < most


def shown(value: object) -> str:
    """Return a bounded form of a value from the file for an error message."""
    text = _SHORT.repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."
