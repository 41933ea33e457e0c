"""What `sdjax generate` was asked for, checked in full before anything is loaded."""

import argparse
import contextlib
import difflib
import math
import os
import re
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdjax import bundled, images
from sdjax.cli.show import note
from sdjax.diffusion.names import CFG_PLUS_PLUS, GUIDANCE, SAMPLERS, SPACINGS, apart
from sdjax.errors import InputError
from sdjax.text import read_prompts, valid

NOISES = ("torch-cpu", "torch-cuda")
DTYPES = ("float32", "bfloat16", "float16")
LAST_SEED = 2**64 - 1
_LARGEST = float(np.finfo(np.float32).max)  # above it a number is infinite to a program


class Lora(NamedTuple):
    """A file of low-rank updates, and how much of them."""

    path: str
    scale: float = 1.0
    sha256: str | None = None  # that it must have, to repeat an image


class Request(NamedTuple):
    """One run of `sdjax generate`; None leaves a choice to the model or the device."""

    prompts: list[str]
    negative: str | None
    seeds: list[int]  # every prompt is made with each
    steps: int | None
    sampler: str | None
    spacing: str | None
    noise: str | None
    guidance: float | None
    method: str | None  # of guidance
    height: int | None
    width: int | None
    dtype: str | None
    batch: int | None
    model: str
    config: str | None
    ema: bool
    variant: str | None
    loras: tuple[Lora, ...]
    folder: Path
    stem: str | None  # of the one image, where the user named it
    repeats: Mapping[str, Any] | None  # the settings of the image that this repeats
    insists: bool  # on this model, though another made that image


def read(asked: argparse.Namespace) -> Request:
    """Check every option; with --from, what is not given comes from the image."""
    repeats = asked.source is not None
    old: dict[str, Any] = images.read_settings(asked.source) if repeats else {}

    def given(name: str, key: str) -> Any:
        value = getattr(asked, name)
        return value if value is not None else old.get(key)

    prompts = _prompts(asked, old)
    count = whole("count", asked.count or "1", 1, 1_000_000)
    steps = given("steps", "steps")
    steps = whole("steps", steps, 1, 1000) if steps is not None else None
    named = known("sampler", given("sampler", "sampler"), (*SAMPLERS, *CFG_PLUS_PLUS))
    method = known("guidance method", asked.guidance_method, GUIDANCE)
    sampler, method = apart(named, method)
    before = known("guidance method", old.get("guidance_method"), GUIDANCE)
    method = before if method is None else method
    spacing = known("spacing", given("spacing", "spacing"), SPACINGS)
    noise = known("noise", given("noise", "noise"), NOISES)
    guidance = asked.guidance
    if guidance is None and (method == "cfg_plus_plus") == (before == "cfg_plus_plus"):
        guidance = old.get("guidance_scale")  # CFG++'s is another kind of number
    guidance = number("guidance", guidance) if guidance is not None else None
    height, width = (side(name, given(name, name)) for name in ("height", "width"))
    dtype = known("dtype", given("dtype", "dtype"), DTYPES)
    batch = given("batch", "batch")
    batch = whole("batch", batch, 1, 65536) if batch is not None else None
    same = asked.model is None  # as the image's; its other options belong to that model
    model = _model(given("model", "model"), asked.source if same else None, old)
    place = _place(asked.out, len(prompts) * count)
    return Request(
        prompts=prompts,
        negative=_text("negative", given("negative", "negative_prompt")),
        seeds=_seeds(given("seed", "seed"), count),
        steps=steps,
        sampler=sampler,
        spacing=spacing,
        noise=noise,
        guidance=guidance,
        method=method,
        height=height,
        width=width,
        dtype=dtype,
        batch=batch,
        model=model,
        config=asked.config or (_config(old) if same else None),
        ema=asked.ema or (same and old.get("ema") is True),
        variant=asked.variant or (_text("variant", old.get("variant")) if same else None),
        loras=_loras(asked.lora, old, asked.source),
        folder=place[0],
        stem=place[1],
        repeats=old or None,
        insists=not same,
    )


def whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number in a range."""
    text = str(value).strip()
    if not re.fullmatch(r"[+-]?\d{1,30}", text, re.ASCII) or not low <= int(text) <= high:
        top = "2**64 - 1" if high == LAST_SEED else high
        raise InputError(f"{name} must be a whole number from {low} to {top}, got {_shown(text)}")
    return int(text)


def number(name: str, value: Any, such: str = "7.5") -> float:
    """A number that is finite in float32."""
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    if not abs(result) <= _LARGEST:
        raise InputError(f"{name} must be a finite number such as {such}, got {_shown(value)}")
    return result


def known(name: str, value: Any, names: Sequence[str]) -> str | None:
    """One of some names, or none; the nearest is proposed for others."""
    if value is None or value in names:
        return value
    plain = re.sub(r"[^a-z0-9+]+", "_", str(value).lower()).replace("++", "pp")
    plain = {"euler_a": "euler_ancestral", "fp16": "float16", "fp32": "float32"}.get(plain, plain)
    near = difflib.get_close_matches(plain, names, 1, 0.5)
    mend = f"try {near[0]}" if near else f"there are {', '.join(names)}"
    raise InputError(f"unknown {name} {_shown(value)}: {mend}")


def side(name: str, value: Any) -> int | None:
    """A height or width that the latent grid can hold."""
    if value is None:
        return None
    pixels = whole(name, value, 1, 65536)
    if pixels % 8:
        low = pixels // 8 * 8
        mend = f"{low} or {low + 8}" if low else "8"
        raise InputError(f"{name} must be a multiple of 8, got {pixels}: try {mend}")
    return pixels


def from_home(path: str) -> str:
    """A path as an image says it: under the user's home as ~, which names nobody."""
    path, home = os.path.abspath(path), os.path.abspath(os.path.expanduser("~"))
    inside = path.startswith(home.rstrip(os.sep) + os.sep)
    return os.path.join("~", os.path.relpath(path, home)) if inside else path


def near_home(path: str) -> str:
    """The inverse of `from_home`; what is there under the very name goes first."""
    return path if os.path.lexists(path) else os.path.expanduser(path)


def _shown(value: Any) -> str:
    """A value as the user wrote it, in quotes where it is no plain word."""
    text = str(value)
    return text[:60] if re.fullmatch(r"[\w.+-]+", text) else f"{text!r:.60}"


def _prompts(asked: argparse.Namespace, old: Mapping[str, Any]) -> list[str]:
    if asked.prompts and asked.file:
        raise InputError("prompts were given both on the command line and by --prompts: take one")
    prompts = list(asked.prompts)
    if asked.file:
        prompts = read_prompts(asked.file)
    elif not prompts and "prompt" in old:
        prompts = [old["prompt"]]
    if not prompts:
        raise InputError(
            'no prompt was given: try sdjax generate "a red house by the sea at night"'
        )
    return [valid(prompt) for prompt in prompts]


def _text(name: str, value: Any) -> str | None:
    return None if value is None else valid(value, name)


def _config(old: Mapping[str, Any]) -> str | None:
    value = _text("config", old.get("config"))
    return None if value is None else near_home(value)


def _seeds(value: Any, count: int) -> list[int]:
    if value is None:
        first = secrets.randbits(32)
        note(f"seed {first}")
    else:
        first = whole("seed", value, 0, LAST_SEED)
    if first + count - 1 > LAST_SEED:
        raise InputError(
            f"seed {first} and a count of {count} pass the last seed, 2**64 - 1: "
            f"take a seed of at most {LAST_SEED - count + 1}"
        )
    return list(range(first, first + count))


def _model(value: Any, source: str | None, old: Mapping[str, Any]) -> str:
    """Where the model is; `source` is the image that names it, if it is not the user who does."""
    value = bundled.NAME if value is None else value
    if bundled.is_named(value):
        bundled.folder()
        return value
    value = near_home(valid(value, "model"))
    if "\0" in value:
        raise InputError(f"model {ascii(value):.80} is no path")
    hub_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", value)
    if not os.path.lexists(value) and not hub_id:
        if source and _is_bundled(old.get("model_hash")):
            return bundled.NAME
        why = f", where {source} was made: give --model" if source else ": check --model"
        raise InputError(f"there is no model at {value or 'an empty path'}{why}")
    return value


def _is_bundled(sha256: Any) -> bool:
    """Whether weights of this hash are the bundled model's, wherever the image found them."""
    if not bundled.HOME.is_dir():
        return False
    from sdjax.checkpoints import inspect

    return inspect(bundled.NAME).sha256 == sha256


def _loras(
    given: Sequence[str] | None, old: Mapping[str, Any], source: str | None
) -> tuple[Lora, ...]:
    """Those of the command line, or else those of the image."""
    found = [_lora(text) for text in given or ()]
    told = old.get("loras") if given is None else None
    for entry in told if isinstance(told, list) else [told] if told else []:
        if not isinstance(entry, dict):
            raise InputError(f"{source}: its settings (the text `sdjax`) are damaged")
        path = near_home(valid(entry.get("path"), "LoRA"))
        scale = number("the scale of a LoRA", entry.get("scale"), "0.8")
        found.append(Lora(path, scale, valid(entry.get("hash"), "hash of a LoRA")))
    for lora in found:
        if "\0" in lora.path or not os.path.lexists(lora.path):
            why = f", with which {source} was made: give --lora" if told else ": check --lora"
            path = lora.path.replace("\0", "\\0")
            raise InputError(f"there is no LoRA at {path}{why}")
    return tuple(found)


def _lora(text: str) -> Lora:
    """FILE, or FILE:SCALE where there is no file of the whole name."""
    text = valid(text, "LoRA")
    path, colon, scale = text.rpartition(":")
    numeric = re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?|[+-]?(nan|inf)", scale, re.IGNORECASE)
    whole, part = near_home(text), near_home(path)
    if not colon or os.path.lexists(whole) or not (numeric or os.path.lexists(part)):
        return Lora(whole)
    return Lora(part, number("the scale of a LoRA", scale, "0.8"))


def _place(out: str | None, total: int) -> tuple[Path, str | None]:
    """The folder for images, and a name for the one; tried out before the work starts."""
    path = Path(out or "images")
    if "\0" in str(path):
        raise InputError(f"out {ascii(out):.80} is no path")
    stem = None
    try:
        if path.suffix.lower() == ".png" and not path.is_dir():
            if total > 1:
                raise InputError(f"{path} is one file, for {total} images: give --out a folder")
            if os.path.lexists(path):
                raise InputError(f"{path} is there already: give --out another name, or a folder")
            path, stem = path.parent, path.stem
        with contextlib.suppress(FileNotFoundError):
            path.lstat()  # a name too long, or a folder that may not be looked into
        there = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise InputError(f"no image can be written to {path}: {error.strerror}") from None
    return path, stem
