"""What the user sees while waiting: results on standard output, all else on standard error."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

_PATIENCE = 1.0
"""Seconds that a wait may last before it is explained."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with what was done by then."""


def say(line: str) -> None:
    """A result. When nobody reads on, the work goes on all the same."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        # Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def note(line: str) -> None:
    """Something worth knowing."""
    print(f"sdjax: {line}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def waiting(line: str) -> Iterator[None]:
    """A note of what takes so long, where it does."""
    timer = threading.Timer(_PATIENCE, note, [line])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def printable(text: str) -> str:
    """Text that cannot control a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


class Progress:
    """Bars on a terminal; elsewhere a line for each long wait."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._stage = ""
        self._said: set[str] = set()

    def loading(self, done: int, total: int) -> None:
        """Told by `load` of bytes."""
        self._show("loading", done, total, bytes_=True)

    def running(self, stage: str, done: int, total: int) -> None:
        """Told by `text_to_image` of its stages."""
        names = {"compile": "compiling", "decode": "decoding"}
        self._show(names.get(stage, stage), done, total)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def _show(self, stage: str, done: int, total: int, bytes_: bool = False) -> None:
        if not sys.stderr.isatty():
            if stage in ("loading", "compiling") and stage not in self._said:
                self._said.add(stage)
                note(f"{stage} {total / 1e9:.2f} GB" if bytes_ else stage)
            return
        if self._bar is None or stage != self._stage:
            from tqdm import tqdm

            self.close()
            self._stage = stage
            self._bar = tqdm(
                total=total,
                desc=f"{stage:9}",
                leave=False,
                unit="B" if bytes_ else "",
                unit_scale=bytes_,
            )
        self._bar.update(done - self._bar.n)
        if done >= total:
            self.close()
