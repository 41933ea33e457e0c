"""Hub ids: a checkpoint by its name, through huggingface_hub where there is a network."""

import os
import re
from pathlib import Path, PurePosixPath

from sdjax.checkpoints import folder
from sdjax.errors import InputError

FILES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".toml")
"""What files end in and no model's name does."""

_PATIENCE = 10.0  # seconds for the Hub to answer before the cache is taken


def is_id(where: str) -> bool:
    """Whether a string could be a model on the Hub: "org/name", and no path mistyped.

    A path is what ends as a file does, or begins with a folder that is here.
    """
    if re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", where) is None:
        return False
    return not where.lower().endswith(FILES) and not os.path.isdir(where.partition("/")[0])


def download(name: str, variant: str | None = None) -> Path:
    """The local folder of a model on the Hub, downloaded unless the cache has it.

    Only the configs, tokenizers and the one variant of the weights that is loaded are fetched.
    Where the Hub cannot be reached, the cache is taken as it is.

    Raises:
        InputError: no such model, or neither a network nor a cached copy.
    """
    from huggingface_hub import HfApi, snapshot_download

    # Every except is broad: what fails raises errors of whichever HTTP library the Hub's has.
    try:
        # `list_repo_files` would try again for half a minute where there is no network.
        listed = HfApi().model_info(name, timeout=_PATIENCE).siblings or []
    except Exception as error:
        try:
            return Path(snapshot_download(name, local_files_only=True))
        except Exception:
            raise InputError(
                f"{name} is no path here and could not be fetched from the Hub ({_reason(error)}): "
                "check the name and the network, or give a folder"
            ) from None
    patterns = wanted([file.rfilename for file in listed], variant)
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        raise InputError(
            f"{name} could not be downloaded from the Hub ({_reason(error)}): check the network, "
            "the disk and your access to the model, and try again"
        ) from None


def _reason(error: Exception) -> str:
    """The first line of what went wrong."""
    return (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")[:160]


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
            shards = folder.shards_of(chosen, names)
            if not shards:
                raise InputError(f"the repository has {part}/{chosen} and none of its shards")
            keep += [f"{part}/{name}" for name in shards]
    return keep
