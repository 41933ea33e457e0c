"""Tables of settings read strictly: every key known, every value of its kind and in its range.

A table is a frozen dataclass whose fields are made by `whole`, `number`, `flag`, `choice`, `text`,
`texts` and `side`: what a value must be stands beside its name, and jax is not needed to say so.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from sdjax.errors import InputError

REQUIRED = dataclasses.MISSING
LARGEST = 2**31 - 1

T = TypeVar("T")


class Kind(NamedTuple):
    """What a value must be."""

    wanted: str
    """The end of the sentence: `a whole number from 1 to 8`."""
    keep: Callable[[Any], Any]
    """The value as it is kept; a ValueError, with a mend or nothing, where it is not wanted."""
    bare: bool = False
    """Whether a word on the command line is taken as it stands: 2024 is a name, not a number."""
    only: str = ""
    """The one kind of run that knows this key; all do where it is empty."""


class Origin(NamedTuple):
    """Where a key was given."""

    file: str
    overridden: frozenset[str] = frozenset()

    def of(self, key: str) -> str:
        """The file's name, or --set for a key, or for a table, given on the command line."""
        parts = key.split(".")
        above = {".".join(parts[: n + 1]) for n in range(len(parts))}
        return "--set" if above & self.overridden else self.file


def whole(default: Any = REQUIRED, low: int = 0, high: int = LARGEST, *, only: str = "") -> Any:
    """Declare a whole number in low..high. Here as below a default of None is no value at all."""

    def keep(value: Any) -> int:
        if isinstance(value, float) and value.is_integer() and low <= value <= high:
            raise ValueError(f"write {int(value)}")
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError
        return value

    end = f"of at least {low}" if high == LARGEST else f"from {low} to {high}"
    return _field(default, Kind(f"a whole number {end}", keep, only=only))


def number(
    default: Any = REQUIRED,
    low: float = 0.0,
    high: float = math.inf,
    *,
    over: bool = False,
    under: bool = False,
    only: str = "",
) -> Any:
    """Declare a finite number in low..high, without low itself if `over`, without high if `under`.

    Whole numbers are taken, and kept as floats.
    """

    def keep(value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError
        inside = low <= value <= high and math.isfinite(value) and abs(value) < 1e300
        if not inside or (over and value == low) or (under and value == high):
            raise ValueError
        return float(value)

    start = f"over {low:g}" if over else f"of at least {low:g}"
    if high < math.inf:
        between = f"{start} and {'under' if under else 'at most'} {high:g}"
        start = between if over or under else f"from {low:g} to {high:g}"
    return _field(default, Kind(f"a finite number {start}", keep, only=only))


def flag(default: Any = REQUIRED, *, only: str = "") -> Any:
    """Declare true or false."""

    def keep(value: Any) -> bool:
        if not isinstance(value, bool):
            lower = str(value).lower()
            raise ValueError(f"try {lower}" if lower in ("true", "false") else "")
        return value

    return _field(default, Kind("true or false", keep, only=only))


def choice(default: Any, names: Sequence[str], *, only: str = "") -> Any:
    """Declare one of some names."""

    def keep(value: Any) -> str:
        if value not in names:
            raise ValueError(_try(value, names))
        return value

    return _field(default, Kind(f"one of {', '.join(names)}", keep, True, only))


def text(default: Any = REQUIRED, *, only: str = "") -> Any:
    """Declare a text that is not empty."""
    return _field(default, Kind("a text that is not empty", _text, True, only))


def texts(default: Any = REQUIRED, names: Sequence[str] = (), *, only: str = "") -> Any:
    """Declare a list of texts, of `names` if given; one text is taken for a list of one."""

    def keep(value: Any) -> tuple[str, ...]:
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list | tuple):
            raise ValueError
        kept = tuple(_text(item) for item in listed)
        for item in kept:
            if names and item not in names:
                raise ValueError(_try(item, names))
        if len(set(kept)) < len(kept) and names:
            raise ValueError
        return kept

    of = f"different names among {', '.join(names)}" if names else "texts that are not empty"
    return _field(default, Kind(f"a list of {of}", keep, True, only))


def side(default: Any = REQUIRED) -> Any:
    """Declare a height or width in pixels: a multiple of 8."""

    def keep(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 65536:
            raise ValueError
        if value % 8:
            low = value // 8 * 8
            raise ValueError(f"try {low} or {low + 8}" if low else "try 8")
        return value

    return _field(default, Kind("a multiple of 8 pixels", keep))


def read_table(
    cls: type[T],
    name: str,
    given: Any,
    origin: Origin,
    known: Iterable[str],
    *,
    only: str,
) -> T:
    """Read one table: `known` are the dotted keys of all tables, `only` the kind of run.

    InputError: no table, an unknown key, one of another kind of run, a value that is not wanted, a
    key missing.
    """
    if not isinstance(given, Mapping):
        raise InputError(f"{origin.of(name)}: {name} must be a table, [{name}], got {shown(given)}")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, value in given.items():
        dotted = f"{name}.{key}"
        if key not in fields:
            raise unknown_key(dotted, known, origin)
        kind = fields[key].metadata["kind"]
        if kind.only and kind.only != only:
            raise InputError(
                f"{origin.of(dotted)}: {dotted} is a setting of kind {kind.only!r} and this run is "
                f"{only!r}: take it away"
            )
        values[key] = _kept(dotted, kind, value, origin)
    for key, field in fields.items():
        if key not in values and field.default is REQUIRED:
            wanted = field.metadata["kind"].wanted
            raise InputError(f"{origin.file}: {name}.{key} is missing: give {wanted}")
    return cls(**values)


def keep(dotted: str, field: dataclasses.Field, value: Any, origin: Origin) -> Any:
    """Check a value that stands in no table."""
    return _kept(dotted, field.metadata["kind"], value, origin)


def unknown_key(dotted: str, known: Iterable[str], origin: Origin) -> InputError:
    """Build the sentence for a key that there is not, with the nearest that there is."""
    table, _, key = dotted.rpartition(".")
    tables: dict[str, str] = {}  # of each key's last part, this table's own first
    for name in sorted(known, key=lambda name: name.rpartition(".")[0] != table):
        tables.setdefault(name.rpartition(".")[2], name)
    beside = [name for name, full in tables.items() if full.rpartition(".")[0] == table]
    near = difflib.get_close_matches(key, beside, 1, 0.6)
    near = near or difflib.get_close_matches(key, tables, 1, 0.6)
    there = f"there are {', '.join(beside)}" if beside else "keys are of the form table.key"
    mend = f"did you mean {tables[near[0]]}?" if near else there
    return InputError(f"{origin.of(dotted)}: there is no setting {shown_key(dotted)}: {mend}")


def shown(value: Any) -> str:
    """A value in a sentence, not too long."""
    found = repr(value)
    return found if len(found) <= 60 else found[:57] + "..."


def shown_key(dotted: str) -> str:
    """A key in a sentence, not too long and without what would control a terminal."""
    return dotted[:80] if dotted.isprintable() else ascii(dotted)[:80]


def kinds(cls: type) -> dict[str, Kind]:
    """What each key of a table must be."""
    return {field.name: field.metadata["kind"] for field in dataclasses.fields(cls)}


def _field(default: Any, kind: Kind) -> Any:
    return dataclasses.field(default=default, metadata={"kind": kind})


def _kept(dotted: str, kind: Kind, value: Any, origin: Origin) -> Any:
    try:
        return kind.keep(value)
    except ValueError as error:
        mend = f": {error}" if str(error) else ""
        raise InputError(
            f"{origin.of(dotted)}: {dotted} must be {kind.wanted}, got {shown(value)}{mend}"
        ) from None


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError
    if "\0" in value:
        raise ValueError("it holds a NUL")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("it is not valid Unicode") from None
    return value


def _try(value: Any, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(value).lower(), names, 1, 0.5)
    return f"try {near[0]}" if near else ""
