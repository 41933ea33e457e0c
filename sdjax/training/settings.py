"""A training run's settings: TOML and `--set` in, frozen dataclasses out, refusals before jax."""

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from sdjax import config
from sdjax.errors import InputError
from sdjax.training.checks import check, completed
from sdjax.training.schema import (
    KINDS,
    TABLES,
    Data,
    Ema,
    Lora,
    Loss,
    Mesh,
    Model,
    Optimizer,
    Run,
    Samples,
    Steps,
)
from sdjax.training.tables import Origin, keep, kinds, read_table, shown, shown_key, unknown_key

__all__ = [
    "Data",
    "Ema",
    "Lora",
    "Loss",
    "Mesh",
    "Model",
    "Optimizer",
    "Run",
    "Samples",
    "Steps",
    "dumps",
    "from_dict",
    "names",
    "read",
    "to_dict",
]

_PLAIN = {field.name: field for field in fields(Run) if field.name not in TABLES}
_KNOWN = [*_PLAIN, *(f"{name}.{key}" for name, cls in TABLES.items() for key in kinds(cls))]


def names() -> tuple[str, ...]:
    """The shipped runs, sorted."""
    home = config.home() / "train"
    if not home.is_dir():
        return ()
    stems = (f.name.removesuffix(".toml") for f in home.iterdir() if f.name.endswith(".toml"))
    return tuple(sorted(stems))


def read(source: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Read a TOML file or a shipped run, then apply `key=value` overrides.

    A value is TOML (`0.5`, `true`, `["a", "b"]`) or a bare word; with none (`model.load=`) the key,
    or a whole table, is taken away. InputError in one sentence: what is wrong, where, the mend.
    """
    file, stem = _found(source)
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{source} is not valid TOML: {error}") from None
    except OSError as error:
        raise InputError(f"{source} cannot be read: {error.strerror}") from None
    given = frozenset(_override(tables, override) for override in overrides)
    if isinstance(tables.get("run", {}), dict):
        tables.setdefault("run", {}).setdefault("out", f"runs/{stem}")
    return from_dict(tables, Origin(str(source), given))


def from_dict(tables: Mapping[str, Any], origin: Origin | str = "settings") -> Run:
    """Check a dict of tables, such as `to_dict` gives; `origin` is its name in messages."""
    if isinstance(origin, str):
        origin = Origin(origin)
    for name in tables:
        if name not in TABLES and name not in _PLAIN:
            raise _unknown(name, tables[name], origin)
    if "kind" not in tables:
        raise InputError(f"{origin.file}: kind is missing: give one of {', '.join(KINDS)}")
    plain = {
        name: keep(name, field, tables[name], origin)
        for name, field in _PLAIN.items()
        if name in tables
    }
    only = plain["kind"]
    read_tables: dict[str, Any] = {
        name: read_table(cls, name, tables.get(name, {}), origin, _KNOWN, only=only)
        for name, cls in TABLES.items()
        if name != "lora" or name in tables
    }
    run = completed(Run(**plain, **({"lora": None} | read_tables)))
    check(run, origin.file)
    return run


def to_dict(run: Run) -> dict[str, Any]:
    """The tables that `from_dict` reads: every key that has a value, defaults written out."""
    plain = {name: getattr(run, name) for name in _PLAIN}
    tables: dict[str, Any] = {name: value for name, value in plain.items() if value is not None}
    for name, cls in TABLES.items():
        table = getattr(run, name)
        if table is None:
            continue
        tables[name] = {
            key: list(value) if isinstance(value, tuple) else value
            for key, of in kinds(cls).items()
            if (value := getattr(table, key)) is not None and of.only in ("", run.kind)
        }
    return tables


def dumps(run: Run) -> str:
    """The TOML of a run, which `read` reads back to an equal one."""
    tables = to_dict(run)
    lines = [f"{name} = {_toml(value)}" for name, value in tables.items() if name in _PLAIN]
    for name, table in tables.items():
        if name not in _PLAIN:
            lines += ["", f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _found(source: str | Path) -> tuple[Traversable, str]:
    if isinstance(source, str) and source in names():
        return config.home() / "train" / f"{source}.toml", source
    path = Path(source)
    if "\0" not in str(source) and path.is_file():
        return path, path.stem
    if "\0" not in str(source) and path.is_dir():
        raise InputError(f"{source} is a folder: give a .toml file")
    near = difflib.get_close_matches(path.stem, names(), 1, 0.6)
    there = f"shipped are {', '.join(names())}" if names() else "give the path of a .toml file"
    mend = f"did you mean {near[0]}?" if near else there
    raise InputError(f"there are no settings at {shown_key(str(source))}: {mend}")


def _override(tables: dict[str, Any], override: str) -> str:
    """Apply one `key=value`; gives its key."""
    key, equals, word = (part.strip() for part in override.partition("="))
    parts = key.split(".")
    if not equals or not all(parts):
        raise InputError(
            f"--set takes key=value, such as optimizer.learning_rate=1e-4, got {shown(override)}"
        )
    origin = Origin("--set")
    if len(parts) > 2 or (len(parts) == 1 and key not in _PLAIN and key not in TABLES):
        raise unknown_key(key, _KNOWN, origin)
    if len(parts) == 2 and key not in _KNOWN:
        if parts[0] not in TABLES:
            raise _unknown(parts[0], {}, origin)
        raise unknown_key(key, _KNOWN, origin)
    table = tables
    if len(parts) == 2:
        table = tables.setdefault(parts[0], {})
        if not isinstance(table, dict):
            return key  # refused by from_dict
    if not word:
        table.pop(parts[-1], None)
        return key
    bare = key in _PLAIN or (len(parts) == 2 and kinds(TABLES[parts[0]])[parts[1]].bare)
    table[parts[-1]] = _value(word, bare)
    return key


def _value(word: str, bare: bool) -> Any:
    try:
        parsed = tomllib.loads(f"x = {word}")
    except tomllib.TOMLDecodeError:
        return word
    if set(parsed) != {"x"} or (bare and not isinstance(parsed["x"], str | list)):
        return word
    return parsed["x"]


def _unknown(name: str, value: Any, origin: Origin) -> InputError:
    """Build the sentence for a name at the top that there is not."""
    if not isinstance(value, Mapping):
        return unknown_key(name, _KNOWN, origin)
    near = difflib.get_close_matches(name, TABLES, 1, 0.5)
    mend = f"did you mean [{near[0]}]?" if near else f"there are {', '.join(TABLES)}"
    return InputError(f"{origin.of(name)}: there is no table [{shown_key(name)}]: {mend}")


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)
