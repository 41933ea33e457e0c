"""The weights of LPIPS, which come as torchvision's VGG16 and `lpips`' own, or as both in one."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdjax.checkpoints import folder, placing
from sdjax.checkpoints.tensors import FLOATS, Tensor
from sdjax.errors import InputError
from sdjax.models.lpips import DEPTHS, LPIPS

BACKBONE = re.compile(r"(?:net\.slice\d\.|features\.)(\d+)\.(weight|bias)")
LINEAR = re.compile(r"(?:lin|lins\.)(\d)\.model\.1\.weight")
TOLERATED = re.compile(r"scaling_layer\.(shift|scale)|classifier\..*")
"""Constants that the module holds, and VGG16's head, which LPIPS does not use."""


def load_lpips(*paths: str | os.PathLike) -> tuple[LPIPS, dict[str, Any]]:
    """Load LPIPS v0.1 with VGG16: a module and its params in float32.

    Args:
        paths: torchvision's VGG16 (`features.0.weight`, ...) and `lpips`' vgg.pth
            (`lin0.model.1.weight`, ...), in any order; or one file that holds both, such as the
            state dict of `lpips.LPIPS(net="vgg")`. `.safetensors`, or what torch pickled.

    Raises:
        InputError: a file that is neither or is damaged, or half of the weights only.
    """
    if not paths:
        raise InputError("LPIPS needs files of weights: give VGG16's and lpips' vgg.pth")
    slices = _slices()
    found: dict[str, Tensor] = {}
    for path in map(Path, paths):
        for key, tensor in folder.read(path).items():
            name = _renamed(key, slices)
            if name is None:
                raise InputError(
                    f"{path} has {key[:80]!r}, which belongs neither to VGG16 nor to LPIPS: give "
                    "torchvision's vgg16 and lpips' vgg.pth"
                )
            if name:
                # The package registers its linear layers twice, as lin0 and as lins.0.
                found[name] = tensor
    where = " and ".join(str(path) for path in paths)
    for part, what, file in (
        ("net.", "the convolutions of VGG16", "torchvision's vgg16"),
        ("lin", "the linear weights of LPIPS", "lpips' vgg.pth"),
    ):
        if not any(name.startswith(part) for name in found):
            raise InputError(f"{where} lacks {what}: give {file} too")
    module = LPIPS(_widths(found, where))
    return module, placing.to_params(module, found, dtype=FLOATS[2], where=where)


def _slices() -> dict[int, int]:
    """The block of each convolution, by its number in torchvision's VGG16."""
    blocks, number = {}, 0
    for block, depth in enumerate(DEPTHS, 1):
        for _ in range(depth):
            blocks[number] = block
            number += 2
        number += 1
    return blocks


def _renamed(key: str, slices: Mapping[int, int]) -> str | None:
    """The key in one state dict of all; "" for what is not needed, None for what is unknown."""
    if TOLERATED.fullmatch(key):
        return ""
    if match := LINEAR.fullmatch(key):
        return f"lin{match[1]}.model.1.weight"
    match = BACKBONE.fullmatch(key)
    if match is None or int(match[1]) not in slices:
        return None
    return f"net.slice{slices[int(match[1])]}.{int(match[1])}.{match[2]}"


def _widths(found: Mapping[str, Tensor], where: str) -> tuple[int, ...]:
    """The channels of each block, which both halves must agree on."""
    widths = []
    for index, number in enumerate((0, 5, 10, 17, 24)):
        conv = found.get(f"net.slice{index + 1}.{number}.weight")
        lin = found.get(f"lin{index}.model.1.weight")
        if conv is None or lin is None:
            missing = f"features.{number}.weight" if conv is None else f"lin{index}.model.1.weight"
            raise InputError(
                f"{where} lacks {missing!r}: give torchvision's vgg16 and lpips' vgg.pth"
            )
        if lin.shape != (1, conv.shape[0], 1, 1):
            raise InputError(
                f"{lin.path}: {lin.name!r} has shape {list(lin.shape)}, and VGG16's block has "
                f"{conv.shape[0]} channels: give lpips' vgg.pth, not alex.pth or squeeze.pth"
            )
        widths.append(conv.shape[0])
    return tuple(widths)
