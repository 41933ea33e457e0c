"""One training step's gradients of the bundled UNet on the CPU: sdjax against torch diffusers.

    python benchmarks/training_step.py --rounds 7

A batch of 64 latents [16, 16, 4] and text states, the squared error of the prediction, float32,
equal weights. Beside torch (channels_last) three programs of ours alternate in one run: split over
a device a core, as the shipped runs are started; on one device; and on one device with XLA's own
convolutions, doubling before them, and statistics taken over groups at once, as flax takes them.
"""

import argparse
import os
import statistics
import time
from unittest import mock

import numpy as np

BATCH = 64


def inputs(model) -> dict[str, np.ndarray]:
    """Noisy latents, timesteps, text states and what should be predicted."""
    rng = np.random.default_rng(0)
    shape = (BATCH, 16, 16, model.unet.in_channels)
    return {
        "x": rng.standard_normal(shape, np.float32),
        "t": rng.integers(0, 1000, BATCH).astype(np.float32),
        "context": rng.standard_normal((BATCH, 77, model.unet.cross_attention_dim), np.float32),
        "wanted": rng.standard_normal(shape, np.float32),
    }


def plain():
    """Patches that take every layer's straight form."""
    import jax.numpy as jnp

    from sdjax.models import convolution, layers

    def doubled(x, kernel):
        x = x.repeat(2, axis=1).repeat(2, axis=2)
        return convolution.direct(x, kernel, 1, ((1, 1), (1, 1)))

    def moments(x, groups, shifted):
        b, n, c = x.shape
        parts = x.reshape(b, n, groups, c // groups)
        found = (f(parts, axis=(1, 3)) for f in (jnp.mean, jnp.var))
        return tuple(jnp.repeat(m, c // groups, axis=-1)[:, None] for m in found)

    own = {"conv2d": convolution.direct, "doubled_conv2d": doubled, "_group_moments": moments}
    return mock.patch.multiple(layers, **own)


def ours(model, params, devices: int):
    """A compiled function of the inputs: the loss and its gradients."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.asarray(jax.devices()[:devices]), ("batch",))
    whole, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("batch",)))

    def loss(params, x, t, context, wanted):
        out = model.unet.apply({"params": params}, x, t, context)
        return jnp.mean((out - wanted) ** 2)

    given = [jax.device_put(a, split) for a in inputs(model).values()]
    params = jax.device_put(params, whole)
    step = jax.jit(jax.value_and_grad(loss)).lower(params, *given).compile()

    def run() -> float:
        value, slopes = step(params, *given)
        jax.block_until_ready(slopes)
        return float(value)

    return run


def torchs(model, threads: int):
    """The same with diffusers."""
    import torch
    from diffusers import UNet2DConditionModel

    from sdjax import bundled

    torch.set_num_threads(threads)
    unet = UNet2DConditionModel.from_pretrained(bundled.HOME / "unet", torch_dtype=torch.float32)
    unet = unet.train().to(memory_format=torch.channels_last)
    given = {name: torch.from_numpy(a) for name, a in inputs(model).items()}
    x, wanted = (
        given[name].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        for name in ("x", "wanted")
    )

    def run() -> float:
        unet.zero_grad()
        out = unet(x, given["t"], given["context"]).sample
        value = torch.mean((out - wanted) ** 2)
        value.backward()
        return value.item()

    return run


def main() -> None:
    """Alternate and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds, cores = parser.parse_args().rounds, len(os.sched_getaffinity(0))
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={cores}"
    os.environ["OMP_WAIT_POLICY"] = "passive"  # torch's threads would spin in our turn
    import sdjax

    model, params = sdjax.load(dtype="float32")
    programs = {
        "sdjax, a device a core": ours(model, params["unet"], cores),
        "sdjax, one device": ours(model, params["unet"], 1),
    }
    with plain():
        programs["sdjax, plain layers"] = ours(model, params["unet"], 1)
    programs["torch"] = torchs(model, cores)
    losses = {name: run() for name, run in programs.items()}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(rounds):
        for name in programs if number % 2 else reversed(programs):
            start = time.perf_counter()
            programs[name]()
            times[name].append(time.perf_counter() - start)
    theirs = statistics.median(times["torch"])
    for name, taken in times.items():
        median = statistics.median(taken)
        rate, ratio = BATCH / median, median / theirs
        print(
            f"{name:24} {rate:5.1f} images/s, {ratio:.2f} of torch's time, loss {losses[name]:.6f}"
        )


if __name__ == "__main__":
    main()
