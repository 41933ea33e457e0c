"""`--lora FILE[:SCALE]`: low-rank updates, read before any weights, merged into them, and told."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdjax.cli.request import Lora, from_home
from sdjax.errors import InputError
from sdjax.model import Model, Params


class Update(NamedTuple):
    """What one file changes."""

    tree: dict[str, Any]
    scale: float
    settings: dict[str, Any]
    """What an image tells of it."""


def load(asked: Sequence[Lora], model: Model) -> list[Update]:
    """Read every file for a model.

    Raises:
        InputError: no LoRA, not this model's, or not the file that the repeated image names.
    """
    from sdjax.checkpoints import digest
    from sdjax.checkpoints.lora import NAME, load_lora

    found = []
    for lora in asked:
        place = Path(lora.path)
        path = place / NAME if place.is_dir() else place
        tree = load_lora(path, model)
        sha256 = digest.sha256(path)
        if lora.sha256 not in (None, sha256):
            raise InputError(
                f"the LoRA {place} ({sha256[:10]}) is not the image's ({lora.sha256:.10}): give "
                "--lora to make it with this one all the same"
            )
        settings = {
            "name": place.resolve().name if place.is_dir() else place.stem,
            "path": from_home(lora.path),
            "scale": lora.scale,
            "hash": sha256,
            "short_hash": short_hash(path, sha256),
        }
        found.append(Update(tree, lora.scale, settings))
    return found


def merged(params: Params, updates: Sequence[Update]) -> Params:
    """The params with all updates, in the order given."""
    if not updates:
        return params
    import jax

    from sdjax.models.lora import merge

    # An accelerator would multiply in fewer bits than the weights have.
    with jax.default_matmul_precision("highest"):
        for update in updates:
            params = merge(params, update.tree, update.scale)
    return params


def short_hash(path: Path, sha256: str) -> str:
    """What A1111 knows a LoRA by: twelve digits of the sha256 of all behind the header."""
    if path.suffix != ".safetensors":
        return sha256[:12]
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]
