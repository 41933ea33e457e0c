"""What is seen of a run: metrics as JSONL and for TensorBoard, progress, and a stop at NaN."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from sdjax.errors import InputError

METRICS = "metrics.jsonl"
_SMOOTH = 0.98  # share of the shown loss that a step keeps


class Log:
    """One run's metrics and progress.

    Every `every` steps the means since the line before go to `metrics.jsonl` and to TensorBoard's
    files in `folder`, and a line to `note`, or to one bar where standard error is a terminal.
    Metrics stay on their device until then, so that steps are not waited for one by one.

    A resumed run gives the `step` that it goes on from, and `carried`, what `state` gave when it
    was saved: later lines are cut, and the file is the one that a run without a break would have
    written, but for the times. With `writes` false, for all processes of a pod but one, nothing is
    written or said.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        steps: int,
        batch_size: int,
        every: int = 20,
        step: int = 0,
        carried: Mapping[str, Any] | None = None,
        note: Callable[[str], None] = lambda line: None,
        writes: bool = True,
        bar: bool | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._steps, self._size, self._every = steps, batch_size, every
        self._note = note if writes else lambda line: None
        self._writes = writes
        carried = carried or {}
        self._sums: dict[str, float] = dict(carried.get("sums", {}))
        self._count: int = carried.get("count", 0)
        self._totals: dict[str, int] = {}
        self._waiting: list[tuple[int, Mapping[str, Any]]] = []
        self._step = step
        self._shown: float | None = carried.get("shown")
        self._start = time.monotonic() - carried.get("seconds", 0.0)
        self._since: float | None = None  # when the rate's clock began
        self._timed = 0  # steps since
        self._rate: float | None = None  # steps a second
        self._board: Any = None
        if writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            cut(self.folder / METRICS, step)
            self._board = _board(self.folder / "tensorboard", step, self._note)
        self._bar = _bar(steps, step) if writes and _wanted(bar) else None

    def step(
        self, step: int, metrics: Mapping[str, Any], totals: Mapping[str, int] | None = None
    ) -> None:
        """Take a step's metrics, scalars; `step` counts from 1.

        `totals` are counts up to this step: a line has the last ones, but for those that are 0.

        InputError: one of the metrics is not finite, as far as that is known by now.
        """
        self._waiting.append((step, metrics))
        self._totals = {name: count for name, count in (totals or {}).items() if count}
        self._step = step
        if self._since is None:
            jax.block_until_ready(metrics)  # the first step compiles, which is nobody's rate
            self._since = time.monotonic()
        else:
            self._timed += 1
        if step % self._every == 0 or step == self._steps:
            self._line(step)
        elif self._bar is not None:
            ready = 0
            while ready < len(self._waiting) and _is_ready(self._waiting[ready][1]):
                ready += 1
            self._take(ready)

    def state(self) -> dict[str, Any]:
        """What a resumed run's log needs, as JSON: call it before a checkpoint is saved.

        InputError: a metric up to here is not finite, and the checkpoint would be worth nothing.
        """
        self._take(len(self._waiting))
        seconds = round(time.monotonic() - self._start, 1)
        return {
            "sums": dict(self._sums),
            "count": self._count,
            "shown": self._shown,
            "seconds": seconds,
        }

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While samples are made: that time is not counted in images per second."""
        self._take(len(self._waiting))
        before = time.monotonic()
        yield
        if self._since is not None:
            self._since += time.monotonic() - before

    def note(self, line: str) -> None:
        """Say something without breaking the bar."""
        if self._bar is None:
            self._note(line)
        else:
            self._bar.clear()
            self._note(line)
            self._bar.refresh()

    def image(self, name: str, step: int, pixels: Any) -> None:
        """Show uint8 [h, w, 3] to TensorBoard."""
        if self._board is not None:
            self._board.add_image(name, pixels, step, dataformats="HWC")
            self._board.flush()

    def finish(self) -> None:
        """Draw the curves of the whole run, where matplotlib is installed."""
        from sdjax.training import curves

        if self._writes and (self.folder / METRICS).exists():
            curves.draw(self.folder / METRICS, self.folder / "curves.png")

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            self._board.close()
        self._bar = self._board = None

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, count: int) -> None:
        """Add up the metrics of steps that are done, waiting for them."""
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        values = jax.device_get([metrics for _, metrics in taken])
        for (step, _), metrics in zip(taken, values, strict=True):
            for name, value in metrics.items():
                if not math.isfinite(value):
                    raise InputError(
                        f"{name} is {float(value)} at step {step}, and nothing was saved since: "
                        "train with a smaller optimizer.learning_rate or optimizer.clip, or a "
                        "longer optimizer.warmup"
                    )
                self._sums[name] = self._sums.get(name, 0.0) + float(value)
            self._count += 1
            loss = float(metrics.get("loss", math.nan))
            old = loss if self._shown is None else self._shown
            self._shown = _SMOOTH * old + (1 - _SMOOTH) * loss
        if self._bar is not None and taken:
            self._bar.set_postfix_str(self._said(), refresh=False)
            self._bar.update(taken[-1][0] - self._bar.n)

    def _line(self, step: int) -> None:
        """Write and say the means since the last line."""
        self._take(len(self._waiting))
        now = time.monotonic()
        if self._timed and self._since is not None:
            rate = self._timed / max(now - self._since, 1e-9)
            self._rate = rate if self._rate is None else 0.5 * self._rate + 0.5 * rate
            self._since, self._timed = now, 0
        else:
            rate = 0.0
        means: dict[str, float] = {
            name: total / self._count for name, total in self._sums.items()
        } | self._totals
        loss = means.get("loss", math.nan)
        self._sums, self._count = {}, 0
        if not self._writes:
            return
        times = {"seconds": round(now - self._start, 1)}
        if rate:
            times["images_per_second"] = round(rate * self._size, 3)
        with open(self.folder / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | means | times) + "\n")
        if self._board is not None:
            for name, value in (means | times).items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        if self._bar is None:
            self._note(f"step {step}/{self._steps}, loss {loss:.4g}{self._pace()}")

    def _said(self) -> str:
        return f"loss {self._shown:.4g}{self._pace()}"

    def _pace(self) -> str:
        if self._rate is None:
            return ""
        left = duration((self._steps - self._step) / self._rate)
        images = self._rate * self._size
        return f", {images:{'.0f' if images >= 100 else '.3g'}} images/s, {left} left"


def cut(path: Path, step: int) -> None:
    """Take lines beyond a step, and a torn one, off a file of metrics."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and _step_of(line) <= step]
    if kept != lines:
        aside = path.with_suffix(".cut")
        aside.write_bytes(b"".join(kept))
        os.replace(aside, path)


def duration(seconds: int | float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"


def _step_of(line: bytes) -> int | float:
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf


def _is_ready(metrics: Mapping[str, Any]) -> bool:
    arrays: list[Any] = [value for value in metrics.values() if isinstance(value, jax.Array)]
    return all(array.is_ready() for array in arrays)


def _wanted(bar: bool | None) -> bool:
    return sys.stderr.isatty() if bar is None else bar


def _bar(steps: int, step: int) -> Any:
    from tqdm import tqdm

    form = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
    return tqdm(total=steps, initial=step, desc="training ", bar_format=form, dynamic_ncols=True)


def _board(folder: Path, step: int, note: Callable[[str], None]) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        note("tensorboardX is not installed, so TensorBoard gets nothing: pip install tensorboardX")
        return None
    # What an earlier process logged beyond this step is hidden by TensorBoard.
    return SummaryWriter(str(folder), purge_step=step + 1)
