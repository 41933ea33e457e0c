"""Pixels on the host: PNG files that carry their settings, contact sheets."""

import contextlib
import json
import math
import os
import re
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sdjax.errors import InputError

_STEM_BYTES = 120  # file systems allow 255 for a name
_SHEET_SIDE = 4096  # a contact sheet is for looking at; the images lie beside it
_CELL_SIDE = 768
_READABLE_SIDE = 256  # smaller images are shown in whole multiples of their size
# How the program whose `parameters` line others read calls them.
_SAMPLERS = {
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "dpmpp_2m": "DPM++ 2M",
    "dpm_2": "DPM2",
    "dpm_2_ancestral": "DPM2 a",
    "lms": "LMS",
    "dpm_fast": "DPM fast",
    "dpm_adaptive": "DPM adaptive",
    "dpmpp_2s_ancestral": "DPM++ 2S a",
    "dpmpp_sde": "DPM++ SDE",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "unipc": "UniPC",
    "plms": "PLMS",
    "lcm": "LCM",
    "restart": "Restart",
}
_SPACINGS = {
    "align_your_steps": "Align Your Steps",
    "align_your_steps_sdxl": "Align Your Steps",
    "beta_sigmas": "Beta",
    "ddim_uniform": "DDIM",
    "kl_optimal": "KL Optimal",
    "sgm_uniform": "SGM Uniform",
}


def read(path: str | Path) -> UInt8[np.ndarray, "h w 3"]:
    """An image file's pixels, turned upright as its EXIF says, transparency laid over white."""
    from PIL import Image, ImageOps

    with _opened(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB"))


def save(
    folder: str | Path,
    stem: str,
    image: UInt8[np.ndarray, "h w 3"],
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write `folder/stem.png`, or stem-2.png and so on where that exists; gives the path.

    The file appears whole or not at all. With settings it carries two texts: `parameters`, the line
    that other programs read, and `sdjax`, all of them as JSON, which `read_settings` reads.
    """
    from PIL import Image, PngImagePlugin

    texts = PngImagePlugin.PngInfo()
    if settings is not None:
        line = parameters(settings).replace("\0", " ").encode("utf-8", "replace").decode()
        texts.add_text("parameters", line)
        texts.add_text("sdjax", json.dumps(dict(settings), sort_keys=True, allow_nan=False))
    folder = Path(folder)
    partial = folder / f".{stem[:40]}.{os.getpid()}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            Image.fromarray(image).save(file, "PNG", pnginfo=texts)
        return _claim(partial, folder, stem)
    except OSError as error:
        raise InputError(
            f"no image could be written to {folder}: {error.strerror or error}"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that `save` wrote into a PNG."""
    with _opened(path, ["PNG"]) as image:
        text = image.text.get("sdjax")
    if text is None:
        raise InputError(
            f"{path} holds no settings of sdjax: it was made or changed by another program"
        )
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise InputError(f"{path}: its settings (the text `sdjax`) are damaged")
    return settings


def parameters(settings: Mapping[str, Any]) -> str:
    """The settings as one text in the form of AUTOMATIC1111's web interface, which others read."""
    sampler = settings.get("sampler") or settings.get("sampler_name")
    spacing = str(settings.get("spacing") or "")
    loras = [(re.sub("[:,<>]", "", lora["name"]), lora) for lora in settings.get("loras") or ()]
    fields = {
        "Steps": settings.get("steps"),
        "Sampler": _SAMPLERS.get(sampler or "", sampler),
        "Schedule type": _SPACINGS.get(spacing, spacing.capitalize()) or None,
        "CFG scale": settings.get("guidance_scale"),
        "Seed": settings.get("seed"),
        "RNG": {"torch-cpu": "CPU", "torch-cuda": "NV"}.get(settings.get("noise") or ""),
        "Size": f"{settings.get('width')}x{settings.get('height')}",
        "Model hash": (settings.get("model_hash") or "")[:10] or None,
        "Model": settings.get("model_name"),
        "Lora hashes": ", ".join(f"{n}: {lora['short_hash']}" for n, lora in loras) or None,
        "Version": f"sdjax {settings['version']}" if "version" in settings else None,
    }
    # To the program whose form this is, a LoRA is part of the prompt.
    said = [f"<lora:{n}:{lora['scale']:g}>" for n, lora in loras]
    lines = [" ".join([str(settings.get("prompt", "")), *said])]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    lines.append(", ".join(f"{k}: {_quoted(v)}" for k, v in fields.items() if v is not None))
    return "\n".join(lines)


def safe_name(prompt: str, seed: int) -> str:
    """A file's stem that every system takes, whatever the prompt holds: `a-cat-in-a-hat-7`.

    Letters, digits and their marks of any script (NFC), joined by dashes; never a reserved name,
    a leading dot or dash, or more than 120 bytes.
    """
    kept = [
        c if c.isalnum() or unicodedata.category(c).startswith("M") else " "
        for c in unicodedata.normalize("NFKC", prompt)
    ]
    words = unicodedata.normalize("NFC", "".join(kept)).split()
    tail = f"-{seed}"
    short = "-".join(words).encode("utf-8", "ignore")[: _STEM_BYTES - len(tail)]
    return (short.decode("utf-8", "ignore").strip("-") or "image") + tail


def contact_sheet(
    images: Sequence[UInt8[np.ndarray, "_h _w 3"]],
    captions: Sequence[str] | None = None,
    columns: int | None = None,
) -> UInt8[np.ndarray, "H W 3"]:
    """Images side by side on white, each with its caption below, in rows of `columns`.

    By default the sheet is near square. Its sides stay under about 4096 pixels; large images are
    shrunk, tiny ones shown in whole multiples of their size.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not images:
        raise InputError("a contact sheet needs an image")
    height, width = (max(i.shape[axis] for i in images) for axis in (0, 1))
    columns = columns or math.ceil(math.sqrt(len(images) * height / width))
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    # Room for gaps and captions beside the images: a tenth of the width, a quarter of the height.
    scale = min(
        _CELL_SIDE / max(height, width),
        _SHEET_SIDE / (columns * width * 1.1),
        _SHEET_SIDE / (rows * height * 1.25),
    )
    scale = min(scale, max(1, _READABLE_SIDE // min(height, width)))
    cell = max(8, round(height * scale)), max(8, round(width * scale))
    gap = max(4, cell[1] // 24)
    font = ImageFont.load_default(size=max(10, min(24, cell[1] // 18)))
    line = math.ceil(font.getbbox("Ag")[3] * 1.3)
    texts = [_wrapped(_drawable(c, font), font, cell[1]) for c in captions or [""] * len(images)]
    band = max(map(len, texts)) * line
    band += gap if band else 0
    size = gap + columns * (cell[1] + gap), gap + rows * (cell[0] + band + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for place, (pixels, lines) in enumerate(zip(images, texts, strict=True)):
        row, column = divmod(place, columns)
        left, top = gap + column * (cell[1] + gap), gap + row * (cell[0] + band + gap)
        size = round(pixels.shape[1] * scale), round(pixels.shape[0] * scale)
        filter = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
        shown = Image.fromarray(pixels).resize(size, filter)
        sheet.paste(shown, (left + (cell[1] - size[0]) // 2, top + (cell[0] - size[1]) // 2))
        for number, text in enumerate(lines):
            at = left, top + cell[0] + gap // 2 + number * line
            draw.text(at, text, fill=(60, 60, 60), font=font)
    return np.asarray(sheet)


def _drawable(text: str, font: Any) -> str:
    """The caption with letters that the font lacks made plain, or left out."""
    nothing = bytes(font.getmask("\uffff"))

    def has(letter: str) -> bool:
        return letter.isprintable() and bytes(font.getmask(letter)) != nothing

    kept = []
    for letter in " ".join(text.split())[:500]:
        plain = unicodedata.normalize("NFKD", letter)[0]
        kept.append(letter if has(letter) else plain if has(plain) else "\0")
    return re.sub("\0+", "...", "".join(kept))


def _wrapped(text: str, font: Any, width: int, most: int = 2) -> list[str]:
    """The caption in lines that fit the width, with an ellipsis where it is cut."""
    lines: list[str] = []
    rest = text
    while rest and len(lines) < most:
        fits = len(rest)
        while fits > 1 and font.getlength(rest[:fits]) > width:
            fits -= 1
        if fits < len(rest):
            last = len(lines) == most - 1
            space = rest.rfind(" ", 0, fits + 1)
            fits = space if space > fits // 2 and not last else fits
            if last:
                while fits > 1 and font.getlength(rest[:fits] + "...") > width:
                    fits -= 1
                return [*lines, rest[:fits].rstrip() + "..."]
        lines.append(rest[:fits].rstrip())
        rest = rest[fits:].lstrip()
    return lines


def _quoted(value: Any) -> str:
    """A value of the `parameters` line: as JSON text where it holds what the line is split at."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:\n"') else text


def _claim(partial: Path, folder: Path, stem: str) -> Path:
    """Give the finished file the first free name, in one step that cannot overwrite."""
    number = 1
    while True:
        path = folder / (f"{stem}.png" if number == 1 else f"{stem}-{number}.png")
        number += 1
        try:
            os.link(partial, path)
            return path
        except FileExistsError:
            continue
        except OSError:  # a file system without hard links
            try:
                path.open("xb").close()
            except FileExistsError:
                continue
            os.replace(partial, path)
            return path


@contextlib.contextmanager
def _opened(path: str | Path, formats: list[str] | None = None) -> Iterator[Any]:
    """A decoded image; whatever is wrong with the file becomes one sentence."""
    from PIL import Image, UnidentifiedImageError

    kind = "a PNG" if formats else "an image"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=formats) as image:
                image.load()
                yield image
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"{path} is not {kind}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(f"{path} claims to be larger than any image should be") from None
    except OSError as error:
        why = error.strerror or error
        raise InputError(f"{path or repr(path)} cannot be read ({why}): check the path") from None
    except (SyntaxError, ValueError, EOFError) as error:
        raise InputError(f"{path} is damaged: {error}") from None
