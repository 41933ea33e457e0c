"""The loop as users run it: killed and resumed, on one device and on eight, in two processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdjax.errors import InputError
from sdjax.training import data, folder, settings
from sdjax.training.loop import train

CONFIG = """
[vae]
_class_name = "AutoencoderKL"
sample_size = 64
latent_channels = 2
block_out_channels = [8, 8, 48]
down_block_types = ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"]
up_block_types = ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"]
layers_per_block = 1
norm_num_groups = 4
mid_block_add_attention = false
"""

RUN = """
kind = "first_stage"
[run]
steps = {steps}
batch_size = 8
log_every = 1
sample_every = 0
save_every = 2
out = "{out}"
[model]
config = "{config}"
[data]
source = "{photos}"
height = 32
width = 32
[optimizer]
learning_rate = 1e-3
warmup = 2
[ema]
decay = 0.99
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop")
    (folder / "tiny.toml").write_text(CONFIG)
    (folder / "photos").mkdir()
    draw = np.random.default_rng(0)
    for number in range(20):
        pixels = draw.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{number:02}.png")
    return folder


def command(home: Path, name: str, steps: int, *more: str) -> list[str]:
    file = home / f"{name}.toml"
    paths = {"out": home / name, "config": home / "tiny.toml", "photos": home / "photos"}
    file.write_text(RUN.format(steps=steps, **paths))
    cache = ["--cache-dir", str(home / "cache")]
    return [sys.executable, "-m", "sdjax", "train", str(file), *cache, *more]


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | more


def run(arguments: list[str], devices: int = 1) -> subprocess.CompletedProcess:
    done = subprocess.run(arguments, env=environment(devices), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def curve(folder: Path) -> list[dict[str, float]]:
    """Every logged metric but the times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    timed = ("seconds", "images_per_second")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def grey(index):
    return data.Example(np.full((8, 8, 3), index, np.uint8), "", "")


@pytest.fixture(scope="module")
def unbroken(home):
    run(command(home, "unbroken", 6))
    return home / "unbroken"


def test_a_killed_run_goes_on_bit_for_bit(home, unbroken):
    arguments = command(home, "killed", 6)
    first = subprocess.Popen(arguments, env=environment(), stderr=subprocess.PIPE, text=True)
    for line in first.stderr:
        if "saved step 2" in line:
            break
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert first.returncode == -signal.SIGKILL
    again = run(arguments)
    assert "going on from step" in again.stderr
    assert curve(home / "killed") == curve(unbroken)
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert (home / "killed" / weights).read_bytes() == (unbroken / weights).read_bytes()


def test_sigterm_saves_and_a_longer_run_goes_on(home, unbroken):
    arguments = command(home, "stopped", 1000)
    process = subprocess.Popen(arguments, env=environment(), stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "step 3/" in line:
            process.send_signal(signal.SIGTERM)
            break
    said = process.stderr.read()
    assert process.wait() == 0
    assert "stopped by SIGTERM" in said
    steps = [int(p.name) for p in (home / "stopped" / "checkpoints").iterdir() if p.name.isdigit()]
    assert max(steps) == len(curve(home / "stopped"))
    want = curve(unbroken)[:3]
    assert curve(home / "stopped")[:3] == want


def test_a_signal_to_the_whole_group_saves_though_the_workers_die(home, tmp_path):
    """The data stop in the second batch, at a picture that never comes."""
    with data.batches(data.Drawn(grey, 16), batch_size=8, height=8, width=8) as batches:
        _, second = (next(batches)["pixels"][:, 0, 0, 0] for _ in range(2))
    endless = next(int(number) for number in second if number >= 8)
    for number in range(16):
        path = tmp_path / f"{number:02}.png"
        if number == endless:
            os.mkfifo(path)
            pipe = path
        else:
            Image.fromarray(np.full((32, 32, 3), number, np.uint8)).save(path)
    more = ("--set", f"data.source={tmp_path}", "--set", "data.workers=1")
    process = subprocess.Popen(
        command(home, "group", 6, *more),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        for line in process.stderr:
            if "step 1/" in line:
                break
        os.killpg(process.pid, signal.SIGTERM)
        timer = threading.Timer(60, process.kill)
        timer.start()
        said = next((line for line in process.stderr if "stopped by" in line), "")
        # The sheet's pictures are read in the process itself, some ahead: let go of that thread.
        os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK))
        process.communicate()
        timer.cancel()
    finally:
        process.kill()
    assert "stopped by SIGTERM at step 1 of 6" in said
    assert process.returncode == 0
    saved = json.loads((home / "group/checkpoints/1/rest/metadata").read_text())
    assert saved["extra"]["data"]["examples"] == 8


NOTING = """
import json, sys
import jax
from sdjax.cli import main
from sdjax.training.checkpoints import Checkpoints

save = Checkpoints.save
def noting(self, step, state, extra):
    held = {}
    for name in ("params", "average", "optimizer"):
        for path, leaf in jax.tree_util.tree_leaves_with_path(getattr(state, name)):
            size = leaf.addressable_shards[0].data.size
            held[f"{name}{jax.tree_util.keystr(path)}"] = [leaf.size, size]
    with open(self.folder.parent / "held.json", "w") as file:
        json.dump(held, file)
    save(self, step, state, extra)

Checkpoints.save = noting
sys.exit(main(sys.argv[1:]))
"""


def test_eight_devices_give_the_losses_of_one_and_four_split_what_is_large(home, unbroken):
    """A kernel of 3 x 3 x 48 x 48, its average and both its moments: a quarter on each device."""
    _, _, _, *asked = command(home, "eight", 6, "--set", "mesh.fsdp=4")
    run([sys.executable, "-c", NOTING, *asked], devices=8)
    sizes = json.loads((home / "eight" / "held.json").read_text())
    count = {}
    for part in ("params", "average", "optimizer"):
        large = [held for name, held in sizes.items() if name.startswith(part) and held[0] == 20736]
        assert all(held == [20736, 5184] for held in large)
        count[part] = len(large)
    assert 0 < count["params"] == count["average"] == count["optimizer"] / 2
    assert all(whole == here for whole, here in sizes.values() if whole < 2**14)
    for got, want in zip(curve(home / "eight"), curve(unbroken), strict=True):
        np.testing.assert_allclose(got["loss"], want["loss"], rtol=1e-5)


def test_two_runs_do_not_share_a_folder(home):
    command(home, "taken", 6)
    with folder.held(home / "taken"):
        with pytest.raises(InputError, match="another process trains in run.out .*taken: wait"):
            train(settings.read(home / "taken.toml"))
    with folder.held(home / "taken"):  # and is free again
        pass


def test_two_processes_give_the_losses_of_one(home, unbroken):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = command(home, "pod", 6, "--set", "mesh.fsdp=2")
    both = []
    for number in range(2):
        told = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(number),
        }
        both.append(
            subprocess.Popen(
                arguments, env=environment(2, **told), stderr=subprocess.PIPE, text=True
            )
        )
    for process in both:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    for got, want in zip(curve(home / "pod"), curve(unbroken), strict=True):
        np.testing.assert_allclose(got["loss"], want["loss"], rtol=1e-5)


def test_torch_loads_the_trained_autoencoder(unbroken):
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(unbroken / "vae")
    assert vae.config.scaling_factor != 0.18215
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        assert torch.isfinite(vae(pixels).sample).all()
