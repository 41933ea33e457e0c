"""A folder of images: Hugging Face's imagefolder layout, or `cat.png` beside `cat.txt`."""

import csv
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TextIO

from sdjax.errors import InputError
from sdjax.training.data.pixels import decode
from sdjax.training.data.source import Example, stamp

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


class Entry(NamedTuple):
    """An image and its caption, or the file that holds its caption."""

    path: str
    """Relative to the folder."""
    caption: str | None
    """None: in the .txt file beside it."""


class Folder:
    """The images below a folder.

    With `metadata.jsonl` (or `metadata.csv`), there or in folders below, the images are those it
    lists: `file_name` relative to it, and the caption in the column `caption_column`. Without,
    every image with its `.txt` beside it. `caption_column=None`: every image, all captions empty.
    Metadata that cannot be right is an InputError; an image that cannot be read is skipped.
    """

    def __init__(self, root: str | Path, caption_column: str | None = "text"):
        self.root = str(root)
        self.skipped: dict[int, str] = {}
        if not os.path.isdir(self.root):
            raise InputError(f"{root} is not a folder")
        files = sorted(_files(self.root))
        metadata = [f for f in files if os.path.basename(f) == "metadata.jsonl"]
        metadata = metadata or [f for f in files if os.path.basename(f) == "metadata.csv"]
        if caption_column is None:
            entries = [Entry(f, "") for f in files if _is_image(f)]
        elif metadata:
            entries = [e for f in metadata for e in _listed(self.root, f, caption_column)]
        else:
            entries = list(_paired(self.root, files))
        if not entries:
            kinds = ", ".join(sorted(SUFFIXES))
            raise InputError(f"{root} holds no images ({kinds}), in folders below neither")
        self.entries = entries

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Example | None:
        entry = self.entries[index]
        try:
            if index in self.skipped:
                return None
            path = os.path.join(self.root, entry.path)
            caption = _beside(path) if entry.caption is None else entry.caption
            return Example(decode(Path(path).read_bytes()), caption, entry.path)
        except OSError as error:
            self.skipped[index] = f"{entry.path}: {error.strerror or error}"
        except ValueError as error:
            self.skipped[index] = f"{entry.path}: {error}"
        return None

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the images' names and their listed captions, in order; contents unread."""
        digest = hashlib.sha256()
        for entry in self.entries:
            digest.update(json.dumps(entry).encode())
        return digest.hexdigest()

    @functools.cached_property
    def stamp(self) -> str:
        """SHA-256 of the sizes and times of change of images, and of the captions beside them."""
        return stamp(self._paths())

    def _paths(self) -> Iterator[str]:
        for entry in self.entries:
            path = os.path.join(self.root, entry.path)
            yield path
            if entry.caption is None:
                yield _text(path)


def _files(root: str) -> Iterator[str]:
    """Every file below the folder that is not hidden, relative to it, with forward slashes."""
    seen = set()  # links may lead in circles
    for here, folders, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(here)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        inside = os.path.relpath(here, root)
        for name in names:
            if not name.startswith("."):
                yield name if inside == "." else os.path.join(inside, name).replace(os.sep, "/")


def _is_image(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in SUFFIXES


def _paired(root: str, files: list[str]) -> Iterator[Entry]:
    known = set(files)
    for file in filter(_is_image, files):
        text = _text(file)
        if text not in known:
            raise InputError(
                f"{root}/{file} has no caption: write {text} beside it or a metadata.jsonl, or set "
                "caption_column to None to train without captions"
            )
        yield Entry(file, None)


def _text(path: str) -> str:
    return os.path.splitext(path)[0] + ".txt"


def _beside(path: str) -> str:
    text = _text(path)
    try:
        return Path(text).read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ValueError(f"its caption {os.path.basename(text)} is not UTF-8") from None


def _listed(root: str, metadata: str, column: str) -> Iterator[Entry]:
    """The entries of one metadata file, every line held against what it must be."""
    folder = PurePosixPath(metadata).parent
    file = os.path.join(root, metadata)
    for line, row in _READERS[os.path.basename(metadata)](file):
        where = f"{file}, line {line}"
        name = row.get("file_name")
        if not isinstance(name, str) or not name:
            raise InputError(f"{where}: it needs a file_name, got {_keys(row)}")
        path = folder / name
        if path.is_absolute() or ".." in path.parts:
            raise InputError(
                f"{where}: file_name {name!r} leads out of the folder: name files below it"
            )
        caption = row.get(column)
        if not isinstance(caption, str):
            got = f"{json.dumps(caption)[:60]} in it" if column in row else f"only {_keys(row)}"
            raise InputError(
                f"{where}: it needs a caption in the column {column!r}, got {got}: set "
                "caption_column to the column that holds it"
            )
        yield Entry(str(path), caption)


def _keys(row: Mapping[str, Any]) -> str:
    return ", ".join(repr(k) for k in row) or "nothing"


def _opened(path: str, newline: str | None = None) -> TextIO:
    try:
        return Path(path).open(encoding="utf-8-sig", newline=newline)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror or error}: mend it, or take it away"
        ) from None


def _lines(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    with _opened(path) as file:
        number = 0
        try:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (json.JSONDecodeError, RecursionError) as error:
                    what = getattr(error, "msg", error)
                    raise InputError(f"{path}, line {number}: not JSON: {what}") from None
                if not isinstance(row, dict):
                    raise InputError(f"{path}, line {number}: not an object, got {line[:60]!r}")
                yield number, row
        except UnicodeDecodeError:
            raise InputError(f"{path}, line {number + 1} or after: not UTF-8") from None


def _rows(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    with _opened(path, newline="") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                yield reader.line_num, {k: v for k, v in row.items() if k is not None}
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{path}, line {reader.line_num + 1}: {error}") from None


_READERS = {"metadata.jsonl": _lines, "metadata.csv": _rows}
