"""A run's folder: whose it is, and that nothing in it is lost."""

import os
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdjax.errors import InputError
from sdjax.training import checks, settings
from sdjax.training.settings import Run

SETTINGS = "settings.toml"
CHECKPOINTS = "checkpoints"
_LOCK = ".lock"


def prepare(run: Run, *, resume: bool = True) -> Path:
    """Make `run.out`, or make sure that what is there may be gone on with, and write the settings.

    Without `resume` a folder that holds checkpoints is refused: nothing is ever deleted.

    InputError: the folder is something else's, holds a run with other settings, or cannot be
    written.
    """
    out = Path(run.run.out)
    if "://" in run.run.out:
        raise InputError(f"run.out {run.run.out} is no folder of this machine: mount it first")
    if os.path.lexists(out) and not out.is_dir():
        raise InputError(f"run.out {out} is a file: give another name")
    # A pod's processes come at once: one may see what another is just writing.
    others = out.is_dir() and any(not p.name.startswith(f".{SETTINGS}") for p in out.iterdir())
    if others and not (out / SETTINGS).is_file():
        raise InputError(
            f"run.out {out} is not empty and holds no run ({SETTINGS} is not there): "
            "give another folder"
        )
    saved = steps(out)
    if saved and not resume:
        raise InputError(
            f"run.out {out} holds a run that is saved up to step {saved[-1]}: to begin anew give "
            "run.out another folder, or remove this one"
        )
    if saved:
        checks.check_resumed(_saved_settings(out / SETTINGS), run)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=out, prefix=f".{SETTINGS}", delete=False, encoding="utf-8"
        ) as file:
            file.write(settings.dumps(run))
        os.chmod(file.name, 0o644)
        os.replace(file.name, out / SETTINGS)
    except OSError as error:
        raise InputError(f"run.out {out} cannot be written: {error.strerror}") from None
    return out


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Let nobody else train in a run's folder meanwhile; the kernel forgets it with the process.

    InputError: somebody does.
    """
    import fcntl

    out.mkdir(parents=True, exist_ok=True)
    with (out / _LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another process trains in run.out {out}: wait for it, or give another folder"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield


def steps(out: Path) -> list[int]:
    """The steps that a run's folder has checkpoints of, ascending, as far as names tell."""
    folder = out / CHECKPOINTS
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal() and name.isascii())


def _saved_settings(path: Path) -> Run | Mapping[str, Any]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}): write it again") from None
    try:
        # An older sdjax did not write the keys that came since: they are as they always were.
        return settings.from_dict(tables)
    except InputError:
        return tables
