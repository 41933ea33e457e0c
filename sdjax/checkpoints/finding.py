"""Where a checkpoint lies, and all that its configs and headers say: what needs no jax."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdjax import bundled
from sdjax.checkpoints import components, detect, fitting, folder, hub, single_file
from sdjax.checkpoints.components import CONFIGS, Network
from sdjax.checkpoints.tensors import Tensors
from sdjax.errors import InputError
from sdjax.text import Tokenizer


@dataclass(frozen=True)
class Source(os.PathLike):
    """A checkpoint before its weights are read: what configs and headers say, which fit together.

    The scheduler's config and its makers' advice are as they stand in the files. It is a path,
    too, that need not be read again.
    """

    where: str
    """As the user gave it."""
    path: Path
    networks: dict[str, Network]
    index: Mapping[str, Any]
    scheduler: dict[str, Any]
    said: str | Path
    """What the scheduler's config is of, for messages."""
    tokenizers: dict[str, Tokenizer]
    note: str = ""
    """What had to be assumed, in one line."""

    def __fspath__(self) -> str:
        return self.where

    @property
    def configs(self) -> dict[str, Any]:
        """Each network's config."""
        return {name: network.config for name, network in self.networks.items()}

    @property
    def family(self) -> str:
        """The shipped config that the networks are an instance of."""
        return family(self.configs, self.scheduler)


def find(
    where: str | os.PathLike,
    *,
    config: str | os.PathLike | None = None,
    ema: bool = False,
    variant: str | None = None,
) -> Source:
    """Find a checkpoint, read its configs and headers, and hold them against each other.

    Arguments are those of `load`. What is found already stays as it is.

    Raises:
        InputError: as `load`, but for the scheduler's config, the makers' advice and what only the
            weights show.
    """
    if isinstance(where, Source):
        return where
    path, given = bundled.place(where), os.fspath(where)
    with readable(path):
        if not path.exists() and not path.is_symlink() and hub.is_id(given):
            path = hub.download(given, variant)
        if not path.is_dir():
            if variant is not None:
                raise InputError(f"variant is for folders, and {path} is not one: leave it out")
            chosen = None if config is None else os.fspath(config)
            return open_file(given, folder.read(path), chosen, ema)
        for name, value in (("config", config), ("ema", ema)):
            if value:
                raise InputError(
                    f"{name} is for single files, and {path} is a folder, whose own files say: "
                    "leave it out"
                )
        path = folder.snapshot(path)
        alone = folder.autoencoder(path, variant)
        if alone is None:
            return open_folder(given, folder.open(path, variant))
        vae = open_network("vae", alone)
        return Source(given, path, {"vae": vae}, {}, {}, path, {})


def open_folder(where: str, opened: folder.Folder) -> Source:
    """`find` for a diffusers folder."""
    networks = {name: open_network(name, part) for name, part in opened.networks.items()}
    source = Source(
        where=where,
        path=opened.path,
        networks=networks,
        index=opened.index,
        scheduler=opened.schedulers["scheduler"],
        said=opened.path / "scheduler" / "scheduler_config.json",
        tokenizers={name: Tokenizer.load(at) for name, at in opened.tokenizers.items()},
    )
    return complete(source)


def open_network(name: str, part: folder.Component) -> Network:
    """One network of a diffusers folder."""
    config = components.configured(name, part.config, part.path / "config.json")
    return components.network(config, part.tensors, part.tensors.path)


def open_file(where: str, tensors: Tensors, config: str | None, ema: bool) -> Source:
    """`find` for a single file."""
    found = detect.identify(tensors, config)
    parts = single_file.parts(tensors, found, ema)
    networks = {
        name: components.network(found.networks[name], parts[name][1], tensors.path)
        for name in CONFIGS
        if name in parts
    }
    plain = {name: dict(part[0]) for name, part in parts.items() if name not in CONFIGS}
    source = Source(
        where=where,
        path=tensors.path,
        networks=networks,
        index=plain.get("model_index", {}),
        scheduler=plain.get("scheduler", {}),
        said=found.name,
        tokenizers={
            name: Tokenizer.clip(padding(plain[name], found.name))
            for name in folder.TOKENIZERS
            if name in plain
        },
        note=found.note or "",
    )
    return complete(source) if "unet" in networks else source


def padding(config: Mapping[str, Any], name: str) -> str:
    """The pad token in a tokenizer's config: a text, or a dict of its flags, as older ones have."""
    token = config.get("pad_token", "<|endoftext|>")
    token = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(token, str):
        raise InputError(f"config {name!r}: 'pad_token' must be text, got {token!r:.80}")
    return token


def complete(source: Source) -> Source:
    """Check that the networks fit together.

    Raises:
        InputError: a network is missing, or two do not fit (`fitting`).
    """
    configs = source.configs
    unet, vae = configs["unet"], configs.get("vae")
    if vae is None or not {"text_encoder", "text_encoder_2"} & set(configs):
        what = "autoencoder" if vae is None else "text encoder"
        raise InputError(f"{source.path} has a UNet and no {what}: give a whole checkpoint")
    fitting.check_text(configs, source.tokenizers, source.path)
    fitting.check_latents(unet, vae, source.path)
    return source


def family(configs: Mapping[str, Any], scheduler: Mapping[str, Any]) -> str:
    """The name of the shipped config that networks are an instance of."""
    unet, encoder = configs.get("unet"), configs.get("text_encoder")
    if unet is None:
        return ""
    inpaint = "-inpaint" if unet.in_channels == 9 else ""
    if unet.num_class_embeds is not None:
        return "x4-upscaler"
    if unet.addition_embed_type == "text_time":
        return f"sdxl{inpaint}" if encoder is not None else "sdxl-refiner"
    if encoder is None or encoder.text.hidden_act == "quick_gelu":
        return f"sd1{inpaint}"
    if inpaint:
        return "sd2-inpaint"
    return "sd2" if scheduler.get("prediction_type") == "v_prediction" else "sd2-base"


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Say what the system refuses to read."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{error.filename or path} cannot be read ({error.strerror or error}): check the path "
            "and its mode"
        ) from None
