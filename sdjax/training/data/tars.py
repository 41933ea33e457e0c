"""WebDataset's tars: members grouped by name, indexed once, then read at random."""

import functools
import hashlib
import itertools
import json
import re
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from sdjax.errors import InputError
from sdjax.training.data.pixels import decode
from sdjax.training.data.source import Example, stamp

_IMAGES = ("jpg", "jpeg", "png", "webp")
_CAPTIONS = ("txt", "json")
_KEYS = ("caption", "text")  # of a .json
# The key is all up to the first dot of the file's name, as in webdataset's `base_plus_ext`.
_NAME = re.compile(r"((?:.*/|)[^./]+)\.([^/]+)")
_BRACES = re.compile(r"\{([^{}]*)\}")
_COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
}


class Span(NamedTuple):
    """Where a member's bytes lie in its tar."""

    offset: int
    size: int


class Member(NamedTuple):
    """One example of a tar."""

    tar: int
    key: str
    suffix: str
    image: Span
    caption: Span | None
    json: bool


class Tars:
    """The examples of WebDataset tars, in the order of the tars and of their images.

    An example is an image (.jpg, .jpeg, .png, .webp) and a caption (.txt, or .json with `caption`,
    `text` or the column named) of one name up to its first dot. Opening reads the headers; nothing
    is ever extracted, so a member's name is a name and no path. A tar cut short gives its whole
    examples, with a warning. `caption_column=None`: captions are not needed, all are empty.
    """

    def __init__(self, paths: Sequence[str | Path], caption_column: str | None = "text"):
        self.paths = [str(p) for p in paths]
        self.fields = (caption_column, *_KEYS)
        self.skipped: dict[int, str] = {}
        bare: list[str] = []
        self.members = [
            member
            for number, path in enumerate(self.paths)
            for member in _index(number, path, caption_column is not None, bare)
        ]
        if not self.members:
            raise InputError(
                f"no examples in {_several(self.paths)}: an example is an image "
                "(0001.jpg, .jpeg, .png or .webp) and its caption (0001.txt or .json)"
            )
        if bare:
            warnings.warn(
                f"images without a caption are left out: {len(bare)}, the first {bare[0]}",
                stacklevel=3,
            )

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> Example | None:
        member = self.members[index]
        tar = self.paths[member.tar]
        name = f"{tar}:{member.key}.{member.suffix}"
        try:
            if index in self.skipped:
                return None
            return Example(decode(_read(tar, member.image)), self._caption(tar, member), name)
        except OSError as error:
            self.skipped[index] = f"{name}: {error.strerror or error}"
        except ValueError as error:
            self.skipped[index] = f"{name}: {error}"
        return None

    def _caption(self, tar: str, member: Member) -> str:
        if member.caption is None:
            return ""
        try:
            text = _read(tar, member.caption).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError("its caption is not UTF-8") from None
        if not member.json:
            return text.strip()
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError("its .json is not JSON") from None
        found = [content.get(f) for f in self.fields] if isinstance(content, dict) else []
        captions = [c for c in found if isinstance(c, str)]
        if not captions:
            raise ValueError(f"its .json has no text in {', '.join(map(repr, self.fields))}")
        return captions[0]

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the tars' file names and of their members' names and places."""
        digest = hashlib.sha256(json.dumps([Path(p).name for p in self.paths]).encode())
        for member in self.members:
            digest.update(json.dumps(member).encode())
        return digest.hexdigest()

    @functools.cached_property
    def stamp(self) -> str:
        """SHA-256 of the tars' sizes and times of change."""
        return stamp(self.paths)


def expand(pattern: str) -> list[str]:
    """The files of a path, of braces ({0000..0123}, {train,more}) or of a glob, sorted.

    Braces name files that must be there; a glob takes what there is.
    """
    paths = []
    for path in _braces(pattern):
        if any(c in path for c in "*?[") and not Path(path).exists():
            found = sorted(map(str, Path(Path(path).anchor or ".").glob(_below_anchor(path))))
            if not found:
                raise InputError(f"no file matches {path}")
            paths += found
        else:
            paths.append(path)
    missing = [p for p in paths if not Path(p).is_file()]
    if missing:
        more = f" nor are {len(missing) - 1} others of {pattern}" if missing[1:] else ""
        raise InputError(f"{missing[0]} is not there{more}: name tars on this machine's disks")
    return paths


def _below_anchor(path: str) -> str:
    return str(Path(path).relative_to(Path(path).anchor))


def _braces(pattern: str) -> Iterator[str]:
    """The pattern with each pair of braces replaced by each of its values."""
    parts = _BRACES.split(pattern)
    for number in range(1, len(parts), 2):
        parts[number] = _values(parts[number], pattern)
    choices = [p if isinstance(p, list) else [p] for p in parts]
    yield from map("".join, itertools.product(*choices))


def _values(inside: str, pattern: str) -> list[str]:
    if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = bounds.groups()
        if int(first) > int(last):
            raise InputError(f"{pattern}: {{{inside}}} counts down: write the smaller number first")
        digits = len(first) if first[0] == "0" or last[0] == "0" else 0
        return [str(i).zfill(digits) for i in range(int(first), int(last) + 1)]
    if "," in inside:
        return inside.split(",")
    raise InputError(
        f"{pattern}: {{{inside}}} is neither a range {{0000..0123}} nor a list {{a,b}}"
    )


def _index(number: int, path: str, captioned: bool, bare: list[str]) -> Iterator[Member]:
    """The examples of one tar, from its headers."""
    groups: dict[str, dict[str, Span]] = {}
    for name, span in _headers(path):
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        key, suffix = match[1], match[2].lower()
        if suffix not in _IMAGES and suffix not in _CAPTIONS:
            continue
        group = groups.setdefault(key, {})
        if suffix in group:
            raise InputError(f"{path} holds {name} twice: names within a tar must differ")
        group[suffix] = span
    for key, group in groups.items():
        image = next((s for s in _IMAGES if s in group), None)
        caption = next((s for s in _CAPTIONS if s in group), None) if captioned else None
        if image is None:
            continue
        if captioned and caption is None:
            bare.append(f"{path}:{key}.{image}")
            continue
        spoken = None if caption is None else group[caption]
        yield Member(number, key, image, group[image], spoken, caption == "json")


def _headers(path: str) -> Iterator[tuple[str, Span]]:
    """Name and place of every plain file in a tar that is all there."""
    try:
        with Path(path).open("rb") as file:
            start = file.read(512)
            size = file.seek(0, 2)
            for magic, program in _COMPRESSED.items():
                if start.startswith(magic):
                    raise InputError(
                        f"{path} is compressed, and reading at random needs a plain tar: "
                        f"run {program} on it (images gain nothing from it)"
                    )
            if not size:
                warnings.warn(f"{path} is empty", stacklevel=2)
                return
            file.seek(0)
            last = "its start"
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    for member in tar:
                        tar.members = []  # type: ignore[attr-defined]  # else it keeps them all
                        if member.offset_data + member.size > size:
                            raise tarfile.ReadError
                        last = member.name
                        if member.isreg() and not member.issparse():
                            yield member.name, Span(member.offset_data, member.size)
                    # A damaged header ends the loop as the end of the tar does.
                    file.seek(tar.offset)
                    if any(file.read(512)):
                        raise tarfile.ReadError
            except (tarfile.TarError, EOFError, ValueError, OverflowError):
                if last == "its start" and size >= 512:
                    raise InputError(f"{path} is not a tar") from None
                warnings.warn(
                    f"{path} is cut short or damaged after {last}: the examples before are used",
                    stacklevel=2,
                )
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


def _read(path: str, span: Span) -> bytes:
    """Opened anew each time: a thousand tars would else hold a thousand files open."""
    with Path(path).open("rb", buffering=0) as file:
        file.seek(span.offset)
        data = file.read(span.size)
    if data is None or len(data) < span.size:
        raise ValueError("the tar is shorter than it was when it was opened")
    return data


def _several(paths: Sequence[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} others"
