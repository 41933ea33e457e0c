"""One guided SD1.5 UNet step on the CPU: sdjax against torch diffusers, alternating in one run.

    python benchmarks/unet_step.py --rounds 7

Batch 2 (without and with the prompt), 512x512 pixels, float32, equal random weights. Each program
lives in a process of its own and computes only when it is told to; torch runs channels_last. Both
report wall and processor time: on a machine that others use, the second is the steadier.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import time
import zlib

import numpy as np

SD15 = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
TIMESTEP = 500
SCALE = 7.5


def weights(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random weights that depend only on the name: gains near 1, maps that keep the variance."""
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    values = rng.standard_normal(shape, dtype=np.float32)
    if len(shape) > 1:
        return values * np.float32(np.prod(shape[1:]) ** -0.5)
    return 0.1 * values + (1 if "norm" in key and key.endswith("weight") else 0)


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Return latents [2, 64, 64, 4] (twice the same image) and text states [2, 77, 768]."""
    rng = np.random.default_rng(0)
    image = rng.standard_normal((1, 64, 64, 4), dtype=np.float32)
    return np.concatenate([image, image]), rng.standard_normal((2, 77, 768), dtype=np.float32)


def sdjax_step(threads: int):
    """Return a function that computes one step with sdjax."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp

    from sdjax.checkpoints.naming import leaves, to_flax_axes
    from sdjax.models.unet import UNet

    unet = UNet.from_config(SD15)
    params: dict = {}
    for key, leaf in leaves(unet).items():
        node = params
        for name in leaf.path[:-1]:
            node = node.setdefault(name, {})
        node[leaf.path[-1]] = jnp.array(to_flax_axes(leaf.path[-1], weights(key, leaf.shape)))
    x, text = map(jnp.asarray, inputs())
    context = jax.jit(lambda p, c: unet.apply(p, c, method="project_context"))(
        {"params": params}, text
    )

    @jax.jit
    def step(params, x, timestep, context):
        out = unet.apply({"params": params}, x, timestep, context)
        without, prompted = jnp.split(out, 2)
        return out, without + SCALE * (prompted - without)

    start = time.perf_counter()
    step = step.lower(params, x, jnp.float32(TIMESTEP), context).compile()
    print(f"sdjax compiled in {time.perf_counter() - start:.0f} s", flush=True)

    def run() -> np.ndarray:
        out, guided = step(params, x, jnp.float32(TIMESTEP), context)
        guided.block_until_ready()
        return np.asarray(out)

    return run


def torch_step(threads: int):
    """Return a function that computes one step with diffusers."""
    import diffusers
    import torch

    torch.set_num_threads(threads)
    config = {k: v for k, v in SD15.items() if not k.startswith("_")}
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**config)
    unet = unet.to_empty(device="cpu").eval()
    with torch.no_grad():
        for key, value in unet.named_parameters():
            value.copy_(torch.from_numpy(weights(key, tuple(value.shape))))
    unet = unet.to(memory_format=torch.channels_last)
    x, text = (torch.from_numpy(a) for a in inputs())
    x = x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)

    def run() -> np.ndarray:
        with torch.no_grad():
            out = unet(x, torch.tensor(float(TIMESTEP)), text).sample
            without, prompted = out.chunk(2)
            without + SCALE * (prompted - without)
        return out.permute(0, 2, 3, 1).numpy()

    return run


STEPS = {"sdjax": sdjax_step, "torch": torch_step}


def worker(name: str, threads: int, pipe) -> None:
    """Build one program, then compute a step for every message."""
    step = STEPS[name](threads)
    pipe.send(step())
    while pipe.recv() == "step":
        wall, processor = time.perf_counter(), time.process_time()
        step()
        pipe.send((time.perf_counter() - wall, time.process_time() - processor))
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def main() -> None:
    """Alternate and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    pipes, outputs, times = {}, {}, {name: [] for name in STEPS}
    for name in STEPS:
        pipes[name], end = context.Pipe()
        context.Process(target=worker, args=(name, args.threads, end), daemon=True).start()
        outputs[name] = pipes[name].recv()  # one after the other: compiling disturbs nobody
    for number in range(args.rounds):
        for name in STEPS if number % 2 else reversed(STEPS):
            pipes[name].send("step")
            times[name].append(pipes[name].recv())
            print(name, *(f"{t:.2f}" for t in times[name][-1]), flush=True)
    ours, theirs = outputs["sdjax"], outputs["torch"]
    result: dict = {"max_rel": float(np.abs(ours - theirs).max() / np.abs(theirs).max())}
    for name in STEPS:
        pipes[name].send("stop")
        wall, processor = (statistics.median(column) for column in zip(*times[name], strict=True))
        result[name] = {"wall_s": wall, "processor_s": processor, "peak_gib": pipes[name].recv()}
    for kind in ("wall_s", "processor_s"):
        result["ratio_" + kind] = result["sdjax"][kind] / result["torch"][kind]
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
