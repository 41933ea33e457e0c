"""Files: what holds no weights at all, JSON within limits, writing all or nothing."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdjax.errors import InputError

AGAIN = "download it again"


def refuse_impostor(path: Path, what: str = "weights") -> None:
    """Name what is wrong with a path that is no file of its kind at all.

    Args:
        path: the file.
        what: what it should hold, for the error.

    Raises:
        InputError: nothing there, a dangling or looping link, a folder, a device, an empty file, a
            Git LFS pointer, or a web page.
    """
    try:
        kind = path.stat()
    except FileNotFoundError:
        if os.path.islink(path):
            raise InputError(
                f"{path} is a link to {os.readlink(path)!r}, which is not there: {AGAIN}"
            ) from None
        raise InputError(f"{path} is not there: check the path") from None
    except OSError as error:
        if os.path.islink(path):
            raise InputError(f"{path} is a link in a loop: {AGAIN}") from None
        raise InputError(f"{path} cannot be read ({error.strerror}): check the path") from None
    if path.is_dir():
        raise InputError(f"{path} is a folder, where a file of {what} belongs")
    if not path.is_file():
        raise InputError(f"{path} is not a regular file, so it holds no {what}")
    if kind.st_size == 0:
        raise InputError(f"{path} is empty: {AGAIN}")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check its mode") from None
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a Git LFS pointer, not the {what}: run `git lfs pull`")
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body", b"<!--")):
        raise InputError(
            f"{path} is a web page, not the {what}: download the file itself, signed in if the "
            "site asks for it"
        )


def unique_keys(text: str) -> Any:
    """Parse JSON, where a key said twice is an error and Python would keep the last.

    Raises:
        ValueError: with the reason in a few words.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:80]!r} twice")
            seen[key] = value
        return seen

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("it nests too deep") from None


def read_json(path: Path, limit: int = 4 * 2**20) -> dict[str, Any]:
    """The JSON object in a config file of at most `limit` bytes.

    Raises:
        InputError: not there, too long, not UTF-8, not JSON, not an object, a key twice.
    """
    refuse_impostor(path, "configuration")
    size = path.stat().st_size
    if size > limit:
        raise InputError(f"{path} has {size} bytes, where a config has at most {limit}: {AGAIN}")
    data = path.read_bytes()
    try:
        parsed = unique_keys(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 at byte {error.start}: {AGAIN}") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({str(error)[:100]}): {AGAIN}") from None
    if not isinstance(parsed, dict):
        raise InputError(f"{path} must hold a JSON object, not a {type(parsed).__name__}: {AGAIN}")
    return parsed


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """A file beside `path` that takes its name when the block ends well and is gone otherwise."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp gives 0600; a checkpoint gets what the user's umask allows.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a config as diffusers and transformers do: sorted, indented by two."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=2, sort_keys=True) + "\n").encode())
