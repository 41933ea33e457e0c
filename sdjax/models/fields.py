"""Reading a network's config.json, which comes from a stranger: one sentence for what is wrong."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sdjax.errors import InputError

MAX_BLOCKS = 16
MAX_CHANNELS = 65_536
MAX_LAYERS = 256
MAX_VOCABULARY = 1_000_000
MAX_PARAMETERS = 50_000_000_000
"""Twenty times the largest network of these families; refused before anything is allocated."""


@dataclass(frozen=True)
class Fields:
    """A config's values, read one by one with their type and range checked.

    `name` is the class in the messages. A key that is absent takes diffusers' own default, which
    the caller states.
    """

    name: str
    values: Mapping[str, Any]

    def error(self, key: str, wanted: str, value: Any) -> InputError:
        """Build the sentence: class, key, what is supported, what was found."""
        found = repr(value)
        found = found if len(found) <= 80 else found[:77] + "..."
        return InputError(f"{self.name} config: {key!r} must be {wanted}, got {found}")

    def integer(self, key: str, default: Any, low: int = 1, high: int = MAX_CHANNELS) -> int:
        """Read an integer in low..high."""
        return self._integer(key, self.values.get(key, default), low, high)

    def optional_integer(self, key: str, low: int = 1, high: int = MAX_CHANNELS) -> int | None:
        """Read an integer in low..high, or null."""
        value = self.values.get(key)
        return None if value is None else self._integer(key, value, low, high)

    def number(self, key: str, default: float, low: float, high: float) -> float:
        """Read a finite number in low..high."""
        value = self.values.get(key, default)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and low <= value <= high):
            raise self.error(key, f"a number from {low} to {high}", value)
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Read true or false."""
        return self._flag(key, self.values.get(key, default))

    def choice(self, key: str, default: Any, choices: Sequence[Any]) -> Any:
        """Read one of a few values."""
        value = self.values.get(key, default)
        if not any(type(value) is type(c) and value == c for c in choices):
            wanted = " or ".join(repr(c) for c in choices)
            raise self.error(key, f"{wanted} (nothing else is supported)", value)
        return value

    def choices(self, key: str, default: Sequence[str], allowed: Sequence[str]) -> tuple[str, ...]:
        """Read a list of 1..16 of the allowed names."""
        value = self.values.get(key, default)
        listed = isinstance(value, list | tuple) and 1 <= len(value) <= MAX_BLOCKS
        if not (listed and all(isinstance(v, str) and v in allowed for v in value)):
            wanted = f"a list of 1 to {MAX_BLOCKS} of {', '.join(allowed)}"
            raise self.error(key, wanted, value)
        return tuple(value)

    def integers(
        self, key: str, default: Any, count: int, low: int = 1, high: int = MAX_CHANNELS
    ) -> tuple[int, ...]:
        """Read one integer for all blocks, or a list with one per block."""
        values = self._per_block(key, self.values.get(key, default), count)
        return tuple(self._integer(key, value, low, high) for value in values)

    def flags(self, key: str, default: bool, count: int) -> tuple[bool, ...]:
        """Read one flag for all blocks, or a list with one per block."""
        values = self._per_block(key, self.values.get(key, default), count)
        return tuple(self._flag(key, value) for value in values)

    def refuse(self, *keys: str) -> None:
        """Refuse keys whose only supported value is null or false."""
        for key in keys:
            if self.values.get(key) not in (None, False):
                raise self.error(key, "null (nothing else is supported)", self.values[key])

    def _integer(self, key: str, value: Any, low: int, high: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(key, f"an integer from {low} to {high}", value)
        return value

    def _flag(self, key: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise self.error(key, "true or false", value)
        return value

    def _per_block(self, key: str, value: Any, count: int) -> Sequence[Any]:
        if not isinstance(value, list | tuple):
            return (value,) * count
        if len(value) != count:
            raise self.error(key, f"one value, or a list of {count} (one a block)", value)
        return value


def values(config: Any) -> dict[str, Any]:
    """A config's fields, or those of the Linen module that it became."""
    names = (field.name for field in fields(config))
    return {name: getattr(config, name) for name in names if name not in ("parent", "name")}


def collapsed(values: tuple) -> Any:
    """One value where all blocks share it, else a list: how configs are written."""
    return values[0] if len(set(values)) == 1 else [_listed(v) for v in values]


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
