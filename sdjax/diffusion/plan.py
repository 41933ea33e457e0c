"""`Plan`: one way to spend n evaluations, for one image or one an image."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

from sdjax.diffusion import guidance, spacings
from sdjax.errors import InputError
from sdjax.types import Denoiser, Sampler

Threshold = tuple[ArrayLike, ArrayLike, ArrayLike]
"""Ratio, limit and maximum of `guidance.threshold`."""


class Plan(NamedTuple):
    """A run of n steps: start from unit noise * init_scale, end with x * final_scale."""

    sampler: Sampler
    sigmas: np.ndarray  # [n+1] float64, or [n+1, b, 1, 1, 1] after `batch`
    timesteps: np.ndarray  # [n] float64: where the network is evaluated (`planned_timestep`)
    init_scale: float | np.ndarray = 1.0
    final_scale: float | np.ndarray = 1.0
    note: str | None = None  # what differs from the program that the config was written for
    clip: float | None = None  # estimates are kept within -clip .. clip: `guidance.clip`
    threshold: Threshold | None = None  # or thresholded with these: `guidance.threshold`


def bounded(denoise: Denoiser, clip: ArrayLike | None, threshold: Threshold | None) -> Denoiser:
    """A (guided) denoiser whose estimates are clipped or thresholded, as a plan says."""
    if threshold is not None:
        return guidance.threshold(denoise, *threshold)
    return denoise if clip is None else guidance.clip(denoise, clip)


def fitted(sampler: Sampler, sigmas: np.ndarray) -> tuple[Sampler, np.ndarray]:
    """A sampler and its run's levels, for those that look ahead in them, or choose them.

    They have `plan(sigmas) -> (sampler, sigmas)`, as `HeunPP2` and `Restart` do.
    """
    plan = getattr(sampler, "plan", None)
    return (sampler, sigmas) if plan is None else plan(sigmas)


def batch(plans: Sequence[Plan]) -> Plan:
    """One plan an image, as one plan: sigmas [n+1, b, 1, 1, 1], timesteps [n, b, 1, 1, 1], scales
    [b, 1, 1, 1].

    Shorter plans are padded, so that images with unequal step counts share a program. The plans
    must have one kind of sampler; its numbers may differ.
    """
    n = max(len(plan.timesteps) for plan in plans)
    samplers: list[Any] = [plan.sampler for plan in plans]
    if any(getattr(s, "landings", None) is not None for s in samplers):
        samplers = [
            dataclasses.replace(s, landings=_landings(plan)) if hasattr(s, "landings") else s
            for s, plan in zip(samplers, plans, strict=True)
        ]
    if len({jax.tree.structure(s) for s in samplers}) != 1:
        raise InputError("plans of one batch must have one kind of sampler")
    planned = getattr(samplers[0], "planned", ())
    sampler = jax.tree_util.tree_map_with_path(functools.partial(_join, planned), *samplers)

    notes = dict.fromkeys(plan.note for plan in plans if plan.note)
    return Plan(
        sampler=sampler,
        sigmas=spacings.pad([plan.sigmas for plan in plans], n + 1),
        timesteps=spacings.pad([plan.timesteps for plan in plans], n),
        init_scale=np.reshape([plan.init_scale for plan in plans], (-1, 1, 1, 1)),
        final_scale=np.reshape([plan.final_scale for plan in plans], (-1, 1, 1, 1)),
        note="; ".join(notes) or None,
        clip=plans[0].clip,
        threshold=plans[0].threshold,
    )


def _landings(plan: Plan) -> np.ndarray:
    """Where a plan's steps land: at the next evaluation, unless it says otherwise."""
    given = getattr(plan.sampler, "landings", None)
    return plan.sigmas[1:] if given is None else np.asarray(given)


def _join(planned: Sequence[str], path: tuple, *leaves: Any) -> Any:
    """One hyper-parameter of all samplers: as it is where they agree, else [b, 1, 1, 1]; a planned
    one of every step or level, padded to the longest as [n, b, 1, 1, 1].
    """
    if np.ndim(leaves[0]) == 1 and getattr(path[0], "name", "") in planned:
        return spacings.pad([np.asarray(leaf) for leaf in leaves])
    if all(np.array_equal(leaf, leaves[0]) for leaf in leaves):
        return leaves[0]
    return np.stack([np.asarray(leaf) for leaf in leaves]).reshape(-1, 1, 1, 1)
