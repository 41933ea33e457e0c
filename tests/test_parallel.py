"""One program on 1, 2, 4 and 8 devices."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from peers import LITTLE, assert_same_pictures, save_tiny_pipeline

from sdjax import parallel

ROOT = Path(__file__).parents[1]

SAMPLE = """
import sys
import jax
import numpy as np
import sdjax

folder, out = sys.argv[1:]
model, params = sdjax.load(folder)
params = sdjax.replicate(params)
size = dict(height=64, width=64)
# Noise of a path of each image's own, guidance with a memory of each image's own.
each = dict(seeds=[0, 1, 2, 3, 4], steps=[2, 3, 2, 3, 3])
asked = dict(sampler="dpmpp_2m_sde", guidance="apg", **size)
images = sdjax.text_to_image(model, params, list("abcde"), **each, **asked)
backwards = {name: values[::-1] for name, values in each.items()}
backwards = sdjax.text_to_image(model, params, list("edcba"), **backwards, **asked)
# No network in it: pure noise, from the start through every draw.
noise = jax.pmap(lambda k: sdjax.White(jax.random.wrap_key_data(k), (8, 8, 4))(1, 1.0, 0.5))
words = sdjax.parallel.split(np.asarray(jax.random.key_data(sdjax.keys(range(5)))), 5)
start = jax.pmap(lambda k: sdjax.diffusion.noise.start(jax.random.wrap_key_data(k), (8, 8, 4)))
np.savez(
    out,
    images=images,
    backwards=backwards[::-1],
    noise=sdjax.parallel.join(noise(words), 5),
    start=sdjax.parallel.join(start(words), 5),
    devices=jax.local_device_count(),
)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd1")
    save_tiny_pipeline(folder, "sd1", unet=LITTLE, vae={"layers_per_block": 1})
    return folder


def on(devices, folder):
    """What a user's own process makes there, optimised as theirs is."""
    out = folder / f"{devices}.npz"
    command = [sys.executable, "-c", SAMPLE, folder, out]
    subprocess.run(command, env=users(devices), cwd=ROOT, check=True)
    return np.load(out)


def users(devices):
    """The environment of a user who has so many devices."""
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    env.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)
    return env


def test_any_number_of_devices_makes_the_same_noise_and_pictures(folder):
    one = on(1, folder)
    for devices in (2, 4, 8):
        many = on(devices, folder)
        assert many["devices"] == devices
        assert (one["noise"] == many["noise"]).all() and (one["start"] == many["start"]).all()
        assert_same_pictures(many["images"], one["images"])
    # On 8 every image was alone on its device: the images around it do not matter, nor its place.
    assert_same_pictures(one["backwards"], one["images"])


AT_ONCE = """
from concurrent.futures import ThreadPoolExecutor
import jax
import jax.numpy as jnp
import numpy as np
import sdjax

model, params = sdjax.load(dtype="float32")
params = params["unet"]
draw = np.random.default_rng(0)
x = draw.standard_normal((2, 12, 16, 16, 4), np.float32)
context = draw.standard_normal((2, 12, 77, model.unet.cross_attention_dim), np.float32)

def sampled(params, x, context):
    def step(x, t):
        y = model.unet.apply({"params": params}, x, t, context)
        return 0.9 * x + 0.1 * y, None

    return jax.lax.scan(step, x, jnp.linspace(999.0, 1.0, 20))[0]

one = jax.jit(sampled)
alone = np.stack([one(params, *both) for both in zip(x, context)])
devices = jax.pmap(sampled, in_axes=(None, 0, 0))(sdjax.replicate(params), x, context)
with ThreadPoolExecutor(2) as pool:
    threads = list(pool.map(lambda i: np.asarray(one(params, x[i], context[i])), range(2)))
print(max(float(abs(np.asarray(made) - alone).max()) for made in (devices, threads)))
"""


def test_programs_that_run_at_once_on_a_cpu_do_not_disturb_each_other():
    """XLA's convolutions by Eigen, at once on two devices or from two threads, are wrong by 1."""
    command = [sys.executable, "-c", AT_ONCE]
    made = subprocess.run(command, env=users(2), cwd=ROOT, check=True, stdout=subprocess.PIPE)
    assert float(made.stdout) < 1e-4


def test_join_undoes_split():
    tree = {"a": np.arange(12).reshape(3, 4), "b": np.arange(3)}
    back = parallel.join(parallel.split(tree, 3), 3)
    assert all((back[name] == tree[name]).all() for name in tree)


def test_replicated_params_are_not_copied_again():
    once = parallel.replicate({"w": np.ones(3)})
    again = parallel.replicate(once)
    assert once["w"].unsafe_buffer_pointer() == again["w"].unsafe_buffer_pointer()


def test_parts_come_together_again():
    tree = {"eta": np.float32(1), "table": np.zeros((7, 3, 1, 1, 1))}
    parts = parallel.Parts.of(tree, lambda leaf: {5: 1}.get(np.ndim(leaf)))
    assert parts.each[0].shape == (3, 7, 1, 1, 1)
    whole = parts.whole()
    assert whole["table"].shape == (7, 3, 1, 1, 1) and whole["eta"] == 1
