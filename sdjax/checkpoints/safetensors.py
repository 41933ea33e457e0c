"""The safetensors format, read lazily and written atomically.

A file is the header's length (8 bytes, little-endian), the header (JSON: key -> dtype, shape and
data_offsets, counted from the header's end), then the arrays. Source: the format's specification,
https://github.com/huggingface/safetensors. A header may lie, so every claim in it is checked before
any of the data is looked at; the arrays must tile the rest of the file exactly.
"""

import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sdjax.checkpoints.files import AGAIN, refuse_impostor, replacing, unique_keys
from sdjax.checkpoints.tensors import BFLOAT16, Map, Tensor, Tensors
from sdjax.errors import InputError

LIMIT = 100_000_000
"""The longest header that is read, in bytes; the reference implementation's own limit."""

DTYPES = {
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "BF16": BFLOAT16,
    "F16": np.dtype(np.float16),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""The names of dtypes, in the order in which the reference writer places their tensors."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def open(path: str | os.PathLike) -> Tensors:
    """The tensors of a safetensors file, from its header alone.

    Raises:
        InputError: when the file is not there, is something else, is cut short, or its header lies.
    """
    path = Path(path)
    refuse_impostor(path)
    file = Map(path)
    if file.size < 8:
        raise InputError(f"{path} is cut short: it has {file.size} bytes and no header: {AGAIN}")
    (length,) = struct.unpack("<Q", file.bytes(0, 8))
    if length > LIMIT:
        raise InputError(
            f"{path} is not a safetensors file: its header claims {length} bytes and at most "
            f"{LIMIT} are allowed: {AGAIN}"
        )
    if 8 + length > file.size:
        raise InputError(
            f"{path} is cut short: its header claims {length} bytes and the file has "
            f"{file.size}: {AGAIN}"
        )
    header = parse(file.bytes(8, 8 + length), path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError(f"{path}: the header's __metadata__ must map strings to strings: {AGAIN}")
    claims = [claim(key, value, path) for key, value in header.items()]
    tile(claims, file.size - 8 - length, path)
    return Tensors(
        {c.key: file.tensor(c.key, c.shape, c.dtype, 8 + length + c.start) for c in claims},
        path,
        metadata,
    )


class Claim(NamedTuple):
    """What a header says of one tensor."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    start: int
    stop: int


def parse(header: bytes, path: Path) -> dict[str, Any]:
    """The header as a dict; a key said twice is an error."""
    try:
        text = header.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: the header is not UTF-8 at byte {8 + error.start}: {AGAIN}"
        ) from None
    try:
        parsed = unique_keys(text)
    except ValueError as error:
        raise InputError(f"{path}: the header is not JSON ({str(error)[:100]}): {AGAIN}") from None
    if not isinstance(parsed, dict):
        raise InputError(f"{path}: the header must be a JSON object: {AGAIN}")
    return parsed


def claim(key: str, value: Any, path: Path) -> Claim:
    """One entry of the header, its types, ranges and size checked."""
    at = f"{path}: tensor {key[:100]!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{at} must have exactly dtype, shape and data_offsets: {AGAIN}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(
            f"{at} has dtype {str(dtype)[:40]!r}, which is not one of "
            f"{', '.join(DTYPES)}: convert it to F16, BF16 or F32"
        )
    if not isinstance(shape, list) or len(shape) > 32 or not naturals(shape):
        raise InputError(f"{at} has a shape that is not a list of sizes: {AGAIN}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not naturals(offsets):
        raise InputError(f"{at} has data_offsets that are not two positions: {AGAIN}")
    start, stop = offsets
    size = DTYPES[dtype].itemsize
    for length in shape:
        size *= length
    if size >= 2**63:
        raise InputError(f"{at} has the shape {shape}, which overflows: {AGAIN}")
    if stop - start != size:
        raise InputError(
            f"{at} of dtype {dtype} and shape {shape} takes {size} bytes, not {stop - start}: "
            f"{AGAIN}"
        )
    return Claim(key, tuple(shape), DTYPES[dtype], start, stop)


def naturals(numbers: list[Any]) -> bool:
    """Whether all are integers that fit the format's 64 bits; JSON's true is no number."""
    return all(type(number) is int and 0 <= number < 2**63 for number in numbers)


def tile(claims: list[Claim], size: int, path: Path) -> None:
    """Check that the tensors cover the data exactly: no overlap, no gap, no end outside."""
    at = 0
    for c in sorted(claims, key=lambda c: (c.start, c.stop)):
        if c.stop > size:
            raise InputError(
                f"{path} is cut short: tensor {c.key[:100]!r} ends at byte {c.stop} of {size}: "
                f"{AGAIN}"
            )
        if c.start != at:
            how = "overlaps the one before it" if c.start < at else "leaves a gap before it"
            raise InputError(f"{path}: tensor {c.key[:100]!r} {how} at byte {c.start}: {AGAIN}")
        at = c.stop
    if at != size:
        raise InputError(f"{path}: {size - at} bytes follow the last tensor: {AGAIN}")


class Entry(NamedTuple):
    """A tensor to be written; `read` is called once, in the order of the file."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def entry(tensor: Tensor, key: str | None = None) -> Entry:
    """A tensor of one file as an entry of another."""
    return Entry(key or tensor.name, tensor.shape, tensor.dtype, tensor.read)


def write(
    path: str | os.PathLike, entries: Iterable[Entry], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, one array in memory at a time, all of it or nothing.

    Tensors stand as the reference writer places them (by dtype, then by key), so equal weights
    give equal bytes. The file appears under its name only when it is whole.

    Args:
        path: where; an existing file is replaced.
        entries: what; keys must differ.
        metadata: strings; {"format": "pt"} unless given, which transformers asks for.
    """
    path = Path(path)
    places = list(DTYPES.values())
    order = sorted(entries, key=lambda e: (places.index(e.dtype), e.key))
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    at = 0
    for e in order:
        if e.key in header:
            raise InputError(f"{path}: the key {e.key!r} would be written twice")
        stop = at + e.dtype.itemsize * int(np.prod(e.shape, dtype=np.int64))
        header[e.key] = {
            "dtype": NAMES[e.dtype],
            "shape": list(e.shape),
            "data_offsets": [at, stop],
        }
        at = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for e in order:
            array = np.asarray(e.read(), e.dtype, order="C")
            if array.shape != e.shape:
                raise ValueError(f"{e.key} has shape {array.shape}, announced as {e.shape}")
            file.write(array.reshape(-1).view(np.uint8).data)
