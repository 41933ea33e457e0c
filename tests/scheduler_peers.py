"""diffusers' schedulers as peers: the loop that its pipelines run, and ours beside it."""

import collections
import dataclasses
import functools
import importlib
import sys
import unittest.mock
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from peers import QUICK

from sdjax.diffusion import noise, profiles, sampling
from sdjax.diffusion.plan import batch
from sdjax.diffusion.schedules import PREDICTIONS, Schedule, planned_timestep, to_x0
from sdjax.types import leaves32

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SHAPE = (2, 2, 1)
FAST = QUICK | {"xla_cpu_use_fusion_emitters": False}  # compiles in a third of the time


def theirs(config):
    """diffusers' scheduler of the config."""
    import diffusers

    if config["_class_name"] == "DPMSolverSDEScheduler":
        diffusers = sde_module()
    options = {k: v for k, v in config.items() if k != "_class_name"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(diffusers, config["_class_name"])(**options)


@functools.cache
def sde_module():
    """DPMSolverSDEScheduler's, of which torchsde is only the noise that the tape replaces."""
    with unittest.mock.patch.dict(sys.modules, {"torchsde": unittest.mock.Mock()}):
        return importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")


def network(x, timestep):
    """A stand-in for a network, smooth, the same arithmetic for torch and jax."""
    return 0.6 * x + 0.3 * x * x / (1 + x * x) + 0.0005 * timestep * x / (1 + x * x)


def torch_run(config, steps, x, draws, double=False, **options):
    """From unit noise (or an image, for an inversion) to the result, by diffusers; `options` go to
    its `step`.

    `double` makes its arithmetic float64, after its tables of noise levels, which stay the same
    numbers: where its own float32 would lose more than is allowed here.
    """
    import torch

    scheduler = theirs(config)
    scheduler.set_timesteps(steps)
    dtype = torch.float64 if double else torch.float32
    if double:
        scheduler.sigmas = scheduler.sigmas.double()
    both = "SDE" in config["_class_name"]  # draws are [n, 2, ...]
    draws = draws.reshape(-1, *x.shape) if both else draws[:, 0]
    tape = iter(torch.from_numpy(d).to(dtype) for d in draws)
    module = sde_module() if both else importlib.import_module(type(scheduler).__module__)
    x = torch.from_numpy(x).to(dtype) * scheduler.init_noise_sigma
    draw = {
        "randn_tensor": lambda *_, **__: next(tape),
        "BrownianTreeNoiseSampler": lambda *_, **__: lambda *_: next(tape),
    }
    with unittest.mock.patch.multiple(module, create=True, **draw):
        for t in scheduler.timesteps:
            out = network(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(out, t, x, **options).prev_sample
    return x.numpy()


def _denoise(sigmas, timesteps, prediction, clip, x, sigma):
    """The stand-in as a denoiser; `prediction` and `clip` are one an image."""
    t = planned_timestep(Schedule(), sigma, sigmas, timesteps)
    out = network(x / jnp.sqrt(1 + sigma**2), t)
    kinds = [to_x0(Schedule(prediction=kind), out, x, sigma) for kind in PREDICTIONS]
    return jnp.clip(jnp.take_along_axis(jnp.stack(kinds), prediction[None], 0)[0], -clip, clip)


@functools.partial(jax.jit, compiler_options=FAST)
def _run(sampler, sigmas, timesteps, prediction, clip, x, draws):
    denoise = functools.partial(_denoise, sigmas, timesteps, prediction, clip)
    return sampling.sample(sampler, denoise, x, sigmas, noise.Tape(draws))


def gaps(configs, steps, double=False, **options):
    """Relative distance of where both end, {(name, n): gap}; `options` are the sampler's numbers,
    which diffusers takes at each step.

    Runs whose samplers have one structure are images of one batch, with unequal step counts: one
    program for many configs.
    """
    groups = collections.defaultdict(list)
    for name, config in configs.items():
        for n in steps:
            plan = profiles.diffusers(config, n)
            assert plan.note is None, (name, plan.note)
            sampler = dataclasses.replace(plan.sampler, **options)
            if getattr(sampler, "landings", plan) is None:  # said or not, it is the same program
                sampler = dataclasses.replace(sampler, landings=plan.sigmas[1:])
            plan = plan._replace(sampler=sampler)
            groups[jax.tree.structure(sampler)].append((name, n, plan))
    rng, found = np.random.default_rng(0), {}
    for runs in groups.values():
        x = rng.standard_normal((len(runs), *SHAPE), np.float32)
        draws = rng.standard_normal((max(steps), 2, len(runs), *SHAPE), np.float32)
        kinds = [Schedule.from_config(configs[name]).prediction for name, *_ in runs]
        prediction = np.reshape([PREDICTIONS.index(kind) for kind in kinds], (-1, 1, 1, 1))
        clip = np.float32([np.inf if plan.clip is None else plan.clip for *_, plan in runs])
        plan = leaves32(batch([plan for *_, plan in runs])._replace(note=None, clip=None))
        fields = (plan.sampler, plan.sigmas, plan.timesteps, prediction, clip.reshape(-1, 1, 1, 1))
        ours = _run(*fields, x * plan.init_scale, draws) * plan.final_scale
        for i, (name, n, _) in enumerate(runs):
            want = torch_run(configs[name], n, x[i], draws[:, :, i], double, **options)
            gap, size = np.abs(np.asarray(ours[i]) - want).max(), np.abs(want).max()
            found[name, n] = float(gap / size if size > 0 else gap)
    return found
