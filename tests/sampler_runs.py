"""What the tests of samplers share: a start, noise, an exact denoiser; runs compiled and plain.

Compiled runs take most of the time here, so that there is one program a kind of sampler: float64, a
batch of three, schedules of up to LONG steps.
"""

import functools

import jax
import jax.numpy as jnp
import k_diffusion
import numpy as np
from peers import QUICK, relative_error

from sdjax.diffusion import noise, sampling, spacings
from sdjax.diffusion.analytic import GaussianMixture
from sdjax.types import leaves32

SHAPE = (3, 2, 2, 1)
N, LONG = 6, 96
DRAWS = np.concatenate(
    [
        np.random.default_rng(seed).standard_normal((LONG, k, *SHAPE))
        for seed, k in ((0, 2), (7, 1))
    ],
    1,
).astype(np.float32)
START = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
SIGMAS = spacings.karras(N, 0.1, 10.0)
# The mixture of k_diffusion.Mixture.
MIXTURE = GaussianMixture(
    np.array([0.4, 0.6]), np.array([-1.0, 1.5]).reshape(2, 1, 1, 1), np.array([0.5, 0.8])
)


@functools.partial(jax.jit, compiler_options=QUICK)
def _run(sampler, x, sigmas, draws):
    return sampling.sample(sampler, MIXTURE, x, sigmas, noise.Tape(draws))


def _float64(leaf):
    return np.asarray(leaf, np.float64)


def compiled(sampler, x, rows, draws=DRAWS):
    """Where a batch of three ends, one schedule an image, in float64."""
    with jax.enable_x64(True):
        arrays = map(_float64, (x, spacings.pad(rows, LONG + 1), draws))
        return np.asarray(_run(jax.tree.map(_float64, sampler), *arrays))


def plain(sampler, x, sigmas, draws=DRAWS, denoise=None, double=False):
    """The carry after every step of a loop in which nothing is compiled."""
    kind = np.float64 if double else np.float32
    if denoise is None:
        denoise = jax.tree.map(kind, MIXTURE)
    with jax.disable_jit(), jax.enable_x64(double):
        sigmas, carries = np.asarray(sigmas, kind), []
        carry = sampling.begin(sampler, jnp.asarray(x, kind))
        for i in range(len(sigmas) - 1):
            tape = noise.Tape(np.asarray(draws, kind))
            carry = sampling.scan(sampler, denoise, carry, sigmas, tape, i, 1)
            carries.append(carry)
    return carries


def recorded(i, sigma, sigma_next, k):
    return DRAWS[i, k].astype(float)


class Counted:
    """The mixture; it counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, sigma):
        self.calls += 1
        return leaves32(MIXTURE)(x, sigma)


def assert_follows(kind, reference, options):
    """Six steps to 0, three to a level above it, two, and one; in float32 against float64."""
    for sigmas in (SIGMAS, SIGMAS[:4], SIGMAS[[0, 2, -1]], SIGMAS[[0, -1]]):
        theirs, ours = k_diffusion.Mixture(), Counted()
        want = reference(theirs, 10.0 * START, sigmas, recorded, **options)
        got = plain(kind(**options), 10 * START, sigmas, denoise=ours)[-1].x
        assert relative_error(got, want) <= (2e-5 if len(sigmas) > 3 else 1e-3)
        assert ours.calls == theirs.calls


def label(value):
    if isinstance(value, dict):
        return "-".join(f"{k}{v}" for k, v in value.items()) or "default"
    return value.__name__
