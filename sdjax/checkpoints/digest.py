"""sha256 of weights, remembered for files that have not changed."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path


def sha256(path: str | Path) -> str:
    """The file's sha256 in hex, whose first ten digits other programs call the model's hash."""
    real = os.path.realpath(path)
    at = os.stat(real)
    state = [at.st_size, at.st_mtime_ns, at.st_ino]
    known = _remembered()
    entry = known.get(real)
    if isinstance(entry, list) and entry[:-1] == state:
        return entry[-1]
    with open(real, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    after = os.stat(real)
    if [after.st_size, after.st_mtime_ns, after.st_ino] == state:
        _remember({real: [*state, digest]})
    return digest


def of_files(paths: Iterable[str | Path]) -> str:
    """One hash for a model: its file's, or for several the sha256 of theirs in order."""
    return combined([sha256(path) for path in dict.fromkeys(paths)])


def combined(digests: Sequence[str]) -> str:
    """One hash of several: a single one is itself."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def home() -> Path:
    """The folder for what sdjax can make again: $XDG_CACHE_HOME/sdjax, else ~/.cache/sdjax."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")) / "sdjax"


def _remembered() -> dict[str, list]:
    try:
        known = json.loads((home() / "sha256.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(new: dict[str, list]) -> None:
    """Keep the last thousand; a home that cannot be written to forgets."""
    path = home() / "sha256.json"
    partial = path.with_name(f".sha256.{os.getpid()}.partial")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = list((_remembered() | new).items())[-1000:]
        partial.write_text(json.dumps(dict(kept)))
        os.replace(partial, path)
