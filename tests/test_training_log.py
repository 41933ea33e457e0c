"""A run in parts logs what one without a break does, and NaN stops it in a sentence."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from sdjax import errors
from sdjax.errors import InputError
from sdjax.training import curves, log
from sdjax.training.log import Log
from sdjax.training.stopping import Stopping

ROOT = str(Path(errors.__file__).parent.parent)
TIMES = ("seconds", "images_per_second")


@pytest.fixture(autouse=True)
def no_board(request, monkeypatch):
    """TensorBoard's files only where a test is about them."""
    if "board" not in request.node.name:
        monkeypatch.setattr(log, "_board", lambda *_: None)


def metrics(step):
    """Losses of no round decimal."""
    return {"loss": jnp.float32(1 / step), "grad_norm/unet": jnp.float32(np.sqrt(step))}


def lines(folder):
    """The file's lines without the times."""
    read = [json.loads(line) for line in (folder / log.METRICS).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in read]


def run(folder, first, last, carried=None, saves=(), **options):
    """Log steps first..last; gives the state at each of `saves`."""
    states = {}
    options = {"steps": 30, "batch_size": 4, "every": 10, "bar": False} | options
    with Log(folder, step=first - 1, carried=carried, **options) as it:
        for step in range(first, last + 1):
            it.step(step, metrics(step))
            if step in saves:
                states[step] = json.loads(json.dumps(it.state()))
    return states


def test_lines_are_the_means_since_the_line_before(tmp_path):
    run(tmp_path, 1, 25, steps=25)
    assert [line["step"] for line in lines(tmp_path)] == [10, 20, 25]
    for line, steps in zip(lines(tmp_path), [(1, 10), (11, 20), (21, 25)], strict=True):
        of = np.arange(steps[0], steps[1] + 1)
        assert line["loss"] == np.mean((1 / of).astype(np.float32), dtype=np.float64)
        assert line["grad_norm/unet"] == np.mean(np.sqrt(of).astype(np.float32), dtype=np.float64)
    last = json.loads((tmp_path / log.METRICS).read_text().splitlines()[-1])
    assert last["images_per_second"] > 0 and last["seconds"] >= 0


@pytest.mark.parametrize("saved", [10, 13])
def test_a_run_killed_and_resumed_writes_the_same_file(tmp_path, saved):
    run(tmp_path / "whole", 1, 30)
    states = run(tmp_path / "parts", 1, 24, saves=[saved])  # killed here, after two lines
    with open(tmp_path / "parts" / log.METRICS, "a") as file:
        file.write('{"step": 30, "lo')
    run(tmp_path / "parts", saved + 1, 30, states[saved])
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == [log.METRICS]


def test_totals_are_what_they_are_at_the_line_and_left_out_at_0(tmp_path):
    with Log(tmp_path, steps=20, batch_size=4, every=10, bar=False) as it:
        for step in range(1, 21):
            it.step(step, metrics(step), {"skipped": max(0, step - 15)})
    assert [line.get("skipped") for line in lines(tmp_path)] == [None, 5]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_stops_with_its_step(tmp_path, value):
    with Log(tmp_path, steps=100, batch_size=4, every=10, bar=False) as it:
        for step in range(1, 8):
            it.step(step, metrics(step) | ({"loss": jnp.float32(value)} if step >= 6 else {}))
        with pytest.raises(InputError) as before_saving:
            it.state()
        assert not (tmp_path / log.METRICS).exists()
    assert str(before_saving.value).startswith(f"loss is {value} at step 6, and nothing was saved")
    with Log(tmp_path, steps=100, batch_size=4, every=2, bar=False) as it:
        it.step(1, metrics(1))
        with pytest.raises(InputError, match="grad_norm/unet is nan at step 2"):
            it.step(2, metrics(2) | {"grad_norm/unet": jnp.float32(np.nan)})


def test_elsewhere_than_on_a_terminal_there_is_a_line_at_a_time(tmp_path):
    said = []
    run(tmp_path, 1, 20, note=said.append)
    assert len(said) == 2 and said[0].startswith("step 10/30, loss 0.2929, ")
    assert said[1].startswith("step 20/30, loss 0.06688, ") and said[1].endswith(" left")
    assert " images/s, " in said[1]


def test_on_a_terminal_there_is_one_bar(tmp_path, capsys):
    said = []
    with Log(tmp_path, steps=30, batch_size=4, every=10, note=said.append, bar=True) as it:
        for step in range(1, 31):
            it.step(step, metrics(step))
        it.note("saved step 30")
    assert said == ["saved step 30"]
    shown = capsys.readouterr().err
    assert "| 30/30, loss " in shown and "images/s, 0:00:00 left" in shown


def test_other_processes_of_a_pod_write_nothing(tmp_path):
    said = []
    states = run(tmp_path / "none", 1, 20, saves=[20], note=said.append, writes=False)
    assert said == [] and not (tmp_path / "none").exists() and states[20]["count"] == 0


def test_tensorboard_is_given_the_same_numbers(tmp_path):
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import RecordWriter  # noqa: F401

    with Log(tmp_path, steps=20, batch_size=4, every=10, bar=False) as it:
        for step in range(1, 21):
            it.step(step, metrics(step))
        it.image("samples", 20, np.zeros((8, 8, 3), np.uint8))
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, at, scalars, images, starts = path.read_bytes(), 0, {}, 0, []
    while at < len(data):  # records: length u64, its crc u32, the event, its crc u32
        size = int.from_bytes(data[at : at + 8], "little")
        event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
        at += size + 16
        if event.HasField("session_log"):
            starts.append(event.step)
        for value in event.summary.value:
            if value.HasField("image"):
                images += 1
            else:
                scalars[value.tag, event.step] = value.simple_value
    for line in lines(tmp_path):
        assert scalars["loss", line["step"]] == np.float32(line["loss"])
    assert images == 1
    assert starts == [1]  # what an attempt before this one left from there on is hidden


def test_without_tensorboard_metrics_are_written_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    said = []
    with Log(tmp_path, steps=9, batch_size=4, every=9, note=said.append, bar=False) as it:
        for step in range(1, 10):
            it.step(step, metrics(step))
    assert "tensorboardX is not installed" in said[0] and len(lines(tmp_path)) == 1


def test_curves_are_drawn_small(tmp_path):
    from PIL import Image

    run(tmp_path, 1, 30, every=1)
    with Log(tmp_path, steps=30, batch_size=4, step=30, bar=False) as it:
        it.finish()
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size[0] < 1200
    assert (tmp_path / "curves.png").stat().st_size < 60_000
    assert curves.smoothed(np.arange(5.0), 1).tolist() == [0.5, 1, 2, 3, 3.5]


def test_time_is_said_in_hours_minutes_and_seconds():
    assert [log.duration(s) for s in (0.4, 61, 3599.6, 360_000)] == [
        "0:00:00",
        "0:01:01",
        "1:00:00",
        "100:00:00",
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_a_second_interrupts(number):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Stopping() as stopping:
            assert stopping.asked(1) is None
            os.kill(os.getpid(), number)
            assert stopping.asked(2) == number.name
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_is_never_asked():
    result = []

    def work():
        with Stopping() as stopping:
            result.append(stopping.asked(1))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert result == [None]


def test_sigterm_ends_a_loop_after_its_step():
    code = """
import os, signal
from sdjax.training.stopping import Stopping
with Stopping() as stopping:
    for step in range(1, 100):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        if why := stopping.asked(step):
            print(why, step)
            break
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": ROOT},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "SIGTERM 5\n"), done.stderr
