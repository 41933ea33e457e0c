"""Encoded pictures to pixels, and pixels to the size that is trained on."""

import functools
import io
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

# What is decoded: no format that starts other programs, as EPS does.
_FORMATS = ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"]
# EXIF's orientation: how the stored picture is turned to stand upright.
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


class Fitted(NamedTuple):
    """A picture at the size that is trained on."""

    pixels: UInt8[np.ndarray, "height width 3"]
    top: int
    """Rows cut off above, counted after resizing."""
    left: int
    enlarged: bool


def decode(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels of an encoded picture, or ValueError with what is wrong with it.

    Turned upright as its EXIF says, transparency laid over white, 16 bits brought to 8, the first
    frame of what moves. Colour profiles are not applied.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            most = Image.MAX_IMAGE_PIXELS
            if most is not None and image.width * image.height > most:
                raise ValueError(f"{image.width}x{image.height} is larger than any image should be")
            image.load()
            return _rgb(image)
    except UnidentifiedImageError:
        raise ValueError("not an image" if data else "empty") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError("it claims to be larger than any image should be") from None
    # Damaged files make decoders raise whatever they like, and none of it may end a training.
    except Exception as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def fit(
    pixels: UInt8[np.ndarray, "h w 3"],
    height: int,
    width: int,
    place: Float[np.ndarray, "2"] | None = None,
) -> Fitted:
    """Resize until the picture just covers height x width, antialiased, and cut the rest away.

    `place`: where the cut lies in the room there is, (top, left) each in [0, 1); without, centred.
    A picture of just this size is left as it is, bit for bit.
    """
    from PIL import Image

    h, w = pixels.shape[:2]
    scale = max(height / h, width / w)
    covering = max(height, round(h * scale)), max(width, round(w * scale))
    room = covering[0] - height, covering[1] - width
    if place is None:
        top, left = (round(r / 2) for r in room)
    else:
        top, left = (int(p * (r + 1)) for p, r in zip(place, room, strict=True))
    if covering == (h, w):
        cut = np.ascontiguousarray(pixels[top : top + height, left : left + width])
        return Fitted(cut, top, left, False)
    # Only what is kept is computed: a sliver of a picture would else grow without bound.
    down, across = h / covering[0], w / covering[1]
    box = left * across, top * down, (left + width) * across, (top + height) * down
    box = box[0], box[1], min(box[2], float(w)), min(box[3], float(h))
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS, box=box)
    return Fitted(np.asarray(resized), top, left, scale > 1)


@functools.cache
def _formats() -> list[str]:
    """Those that this Pillow was built with: it fails on the name of any other."""
    from PIL import Image

    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _rgb(image: Any) -> np.ndarray:
    """Eight-bit RGB from whatever kinds of pixels Pillow knows."""
    from PIL import Image

    try:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF spoils no pixels
        turn = None
    if turn is not None:
        image = image.transpose(Image.Transpose[turn])
    if image.mode.startswith("I"):  # 16 bits in one channel, which Pillow would clip
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError(f"its values {values.min()} to {values.max()} are not 16-bit")
        grey = (values * 255 + 0x7FFF) // 0xFFFF
        return np.repeat(grey[..., None], 3, -1).astype(np.uint8)
    if image.mode == "F":
        raise ValueError("its pixels are floats, whose range is not known: save it with 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))
