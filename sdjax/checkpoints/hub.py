"""Hub ids: a checkpoint by its name, through huggingface_hub where there is a network."""

import re
from pathlib import Path, PurePosixPath

from sdjax.checkpoints import folder
from sdjax.errors import InputError


def is_id(where: str) -> bool:
    """Whether a string could be a model on the Hub: "org/name"."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", where) is not None


def download(name: str, variant: str | None = None) -> Path:
    """The local folder of a model on the Hub, downloaded unless the cache has it.

    Only the configs, tokenizers and the one variant of the weights that is loaded are fetched.

    Raises:
        InputError: no such model, or no network.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        files = HfApi().list_repo_files(name)
        return Path(snapshot_download(name, allow_patterns=wanted(files, variant)))
    except (OSError, HFValidationError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        try:
            return Path(snapshot_download(name, local_files_only=True))
        except (OSError, HFValidationError, ValueError):
            reason = str(error).strip().split("\n")[0][:160]
            raise InputError(
                f"{name} is no path here and could not be fetched from the Hub ({reason}): check "
                "the name and the network, or give a folder"
            ) from None


def wanted(files: list[str], variant: str | None = None) -> list[str]:
    """The files of a repository that a folder needs.

    Raises:
        InputError: when it is no diffusers folder.
    """
    if folder.INDEX not in files:
        single = [f for f in files if f.endswith((".safetensors", ".ckpt")) and "/" not in f]
        hint = f", only single files such as {single[0]}: download that" if single else ""
        raise InputError(f"the repository has no {folder.INDEX}{hint}")
    parts: dict[str, list[str]] = {}
    for file in files:
        path = PurePosixPath(file)
        if len(path.parts) == 2:
            parts.setdefault(path.parts[0], []).append(path.name)
    keep = [folder.INDEX]
    for part in (*folder.SCHEDULERS, *folder.TOKENIZERS):
        keep += [f"{part}/{name}" for name in parts.get(part, [])]
    for part in folder.NETWORKS:
        names = parts.get(part)
        if not names:
            continue
        found = folder.candidates(names)
        keep.append(f"{part}/config.json")
        if not found:
            raise InputError(f"the repository has no weights in {part}/")
        chosen = folder.choose(found, variant, part)
        keep.append(f"{part}/{chosen}")
        if chosen.endswith(".json"):
            kind = "*.safetensors" if "safetensors" in chosen else "*.bin"
            keep.append(f"{part}/{kind}")
    return keep
