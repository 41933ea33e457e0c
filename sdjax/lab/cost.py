"""What a sampler costs: evaluations of the network, counted."""

import functools
import math
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from sdjax.diffusion.plan import fitted
from sdjax.diffusion.stochastic import Around
from sdjax.diffusion.trajectories import evaluations
from sdjax.lab.problems import Problem
from sdjax.types import Denoiser, Latents, Sampler, State, Step, StepNoise, pytree


def meter(problem: Problem, sampler: Sampler, spacing: str, count: int) -> Callable[[int], int]:
    """The evaluations that some steps of a spacing take, at least 1.

    Counted by running the steps on nothing; for a sampler that looks at its image to choose its
    steps (its state then counts, in `nfe`), the mean over `count` images of the problem.
    """
    if hasattr(sampler.init(jnp.zeros((1, 1, 1, 1))), "nfe"):
        return functools.partial(_asked, {}, problem, sampler, spacing, count)
    return lambda steps: _counted(sampler, problem.sigmas(spacing, steps))


def afforded(cost: Callable[[int], int], nfe: int) -> tuple[int, int]:
    """(Steps, evaluations): the most steps that at most `nfe` evaluations pay for, or (0, 0).

    Each more step is taken to cost at least one.
    """
    steps = nfe
    while steps > 0:
        made = cost(steps)
        if made <= nfe:
            return steps, made
        # As if every step cost the same; at least one step less.
        steps = min(steps - 1, max(1, round(steps * nfe / made)))
    return 0, 0


_costs: dict[Any, int] = {}


def _counted(sampler: Sampler, sigmas: np.ndarray) -> int:
    """Evaluations of a schedule; counted once for each sampler, number of steps and kind of end."""
    asked = type(sampler), repr(sampler), len(sigmas)
    sampler, sigmas = fitted(sampler, sigmas)
    key = (asked, len(sigmas), bool(sigmas[-1] == 0))
    if key not in _costs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _costs[key] = int(evaluations(sampler, sigmas))
    return _costs[key]


def _asked(
    known: dict[Any, int], problem: Problem, sampler: Sampler, spacing: str, count: int, steps: int
) -> int:
    """Evaluations of a sampler that chooses its steps: the mean over the problem's images.

    `known` keeps what was counted, by the levels that are left of the spacing. One step, to 0,
    leaves nothing to choose: no budget pays for it.
    """
    if steps == 1:
        return sys.maxsize
    key = tuple(fitted(sampler, problem.sigmas(spacing, steps))[1])
    if key not in known:
        found = problem.solve(_Counting(sampler), spacing, steps, count)
        known[key] = math.ceil(found.mean())
    return known[key]


@pytree
class _Counting(Around):
    """A sampler that chooses its steps, whose image is in the end how often it asked."""

    sampler: Any

    def plan(self, sigmas: np.ndarray) -> tuple["_Counting", np.ndarray]:
        sampler, sigmas = fitted(self.sampler, sigmas)
        return _Counting(sampler), sigmas

    def init(self, x: Latents) -> State:
        return self.sampler.init(x)

    def step(
        self, denoise: Denoiser, x: Latents, at: Step, state: State, noise: StepNoise
    ) -> tuple[Latents, State]:
        x, state = self.sampler.step(denoise, x, at, state, noise)
        asked = state.nfe.astype(x.dtype).reshape(-1, 1, 1, 1)
        return jnp.where(at.left == 1, asked, x), state
