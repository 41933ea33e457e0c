"""Other programs' noise, bit for bit: torch itself, Random123's answers, A1111's numbers."""

import elsewhere
import k_diffusion
import numpy as np
import pytest

from sdjax.diffusion import noise, profiles, sampling, spacings, torch_noise
from sdjax.diffusion.analytic import Gaussian
from sdjax.diffusion.samplers import (
    DPMAdaptive,
    DPMSolverPP2MSDE,
    DPMSolverPP3MSDE,
    DPMSolverPPSDE,
    EulerAncestral,
)
from sdjax.diffusion.schedules import Schedule
from sdjax.errors import InputError

SEEDS = [0, 1, 42, 2**31, 2**32 - 1, 2**32 + 5, 2**64 - 1]


def torch_draws(seed, count, draws=1):
    torch = pytest.importorskip("torch")
    generator = torch.Generator("cpu").manual_seed(seed)
    return np.stack([torch.randn(count, generator=generator).numpy() for _ in range(draws)])


@pytest.mark.parametrize("seed", SEEDS)
def test_small_tensors_are_torchs(seed):
    for count in (1, 2, 3, 15):
        for draws in (1, 3):
            want = torch_draws(seed, count, draws)
            np.testing.assert_array_equal(torch_noise.torch_cpu(seed, count, draws), want)


@pytest.mark.parametrize("seed", SEEDS)
def test_large_tensors_are_torchs_tail_included(seed):
    for count in (16, 17, 31, 33, 1000):
        want = torch_draws(seed, count, 2)
        np.testing.assert_array_equal(torch_noise.torch_cpu(seed, count, 2), want)


def test_a_million_values_are_torchs():
    want = torch_draws(7, 2**20)
    np.testing.assert_array_equal(torch_noise.torch_cpu(7, 2**20), want)


def test_latents_are_those_of_a_diffusers_pipeline():
    """One generator an image, drawn as [1, c, h, w]."""
    torch = pytest.importorskip("torch")
    from diffusers.utils.torch_utils import randn_tensor

    generators = [torch.Generator().manual_seed(s) for s in (3, 2**33)]
    want = [randn_tensor((2, 4, 5, 7), generator=generators).numpy() for _ in range(2)]
    got = torch_noise.draw("torch-cpu", [3, 2**33], (5, 7, 4), draws=2)
    np.testing.assert_array_equal(got, np.stack(want).transpose(0, 1, 3, 4, 2))


def test_a_stochastic_run_takes_its_noise_from_the_same_generator():
    """diffusers' Euler ancestral with a generator, against the tape of its later draws."""
    torch = pytest.importorskip("torch")
    from diffusers import EulerAncestralDiscreteScheduler

    scheduler = EulerAncestralDiscreteScheduler()
    scheduler.set_timesteps(4)
    generator = torch.Generator().manual_seed(11)
    x = torch.randn((1, 2, 3, 4), generator=generator) * scheduler.init_noise_sigma
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        scheduler.scale_model_input(x, t)
        away = (x - 0.5) / (1 + sigma**2) ** 0.5  # a network's noise for N(0.5, 1), times sigma
        x = scheduler.step(sigma / (1 + sigma**2) ** 0.5 * away, t, x, generator=generator)[0]
    start, *rest = torch_noise.draw("torch-cpu", [11], (3, 4, 2), draws=5)
    begin = start * float(scheduler.init_noise_sigma)
    sigmas = scheduler.sigmas.numpy()
    tape = noise.Tape(np.stack(rest))
    got = sampling.sample(EulerAncestral(), Gaussian(0.5, 1.0), begin, sigmas, tape)
    np.testing.assert_allclose(got, x.numpy().transpose(0, 2, 3, 1), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "loop", "steps"),
    [
        ("restart", elsewhere.restart, 10),  # no restart, 1 and 2
        ("restart", elsewhere.restart, 20),
        ("restart", elsewhere.restart, 36),
        ("euler_ancestral", k_diffusion.euler_ancestral, 4),
        ("dpm_2_ancestral", k_diffusion.dpm_2_ancestral, 4),
        ("dpmpp_2s_ancestral", k_diffusion.dpmpp_2s_ancestral, 4),
    ],
)
def test_a_run_takes_the_draws_of_one_generator_as_a1111s_loops_do(name, loop, steps):
    """The loops ask torch for a tensor each time that they add noise, and at no other."""
    torch = pytest.importorskip("torch")
    levels = spacings.named("karras", steps, Schedule())[0]
    generator, shape, asked = torch.Generator().manual_seed(11), (3, 4, 2), []

    def draw(*_):
        asked.append(torch.randn((1, 2, 3, 4), generator=generator).numpy())
        return asked[-1].transpose(0, 2, 3, 1)

    def denoise(x, sigma):  # of N(0.5, 0.04)
        return (0.04 * x + 0.5 * sigma**2) / (0.04 + sigma**2)

    x = loop(denoise, draw() * levels[0], levels, draw)
    if name == "restart":
        assert len(asked) - 1 == {10: 0, 20: 1, 36: 2}[steps]
    plan = profiles.k_diffusion(Schedule(), name, "karras", steps)
    start, later = torch_noise.record("torch-cpu", [11], shape, plan)
    begin = start * plan.init_scale
    got = sampling.sample(plan.sampler, Gaussian(0.5, 0.2), begin, plan.sigmas, later)
    np.testing.assert_allclose(got, x, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", torch_noise.NAMES)
def test_every_step_has_its_draws_and_a_run_without_noise_none(name):
    """Each as the generator's next, whether the step uses it: diffusers' order for the SDE."""
    for sampler in (DPMSolverPP2MSDE(), DPMSolverPP3MSDE()):
        plan = profiles.k_diffusion(Schedule(), sampler, "karras", 3)
        start, later = torch_noise.record(name, [5, 6], (3, 4, 2), plan)
        got = np.concatenate([start[None], later.draws[:, 0]])
        np.testing.assert_array_equal(got, torch_noise.draw(name, [5, 6], (3, 4, 2), 4))
    plan = profiles.k_diffusion(Schedule(), "dpmpp_2m", "karras", 3)
    assert torch_noise.record(name, [5, 6], (3, 4, 2), plan)[1] is None


# Random123's kat_vectors: counter, key, answer.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def test_philox_gives_the_known_answers():
    for counter, key, answer in KNOWN:
        got = torch_noise.philox(np.array(counter, np.uint32)[:, None], np.array(key, np.uint32))
        assert got[:, 0].tolist() == answer


def test_cuda_noise_is_what_a_gpu_gave():
    """The twelve numbers that A1111's rng_philox.py says of `torch.randn` on CUDA with seed 0."""
    want = [
        *(-0.92466259, -0.42534415, -2.6438457, 0.14518388),
        *(-0.12086647, -0.57972564, -0.62285122, -0.32838709),
        *(-1.07454231, -0.36314407, -1.67105067, 2.26550497),
    ]
    np.testing.assert_allclose(torch_noise.torch_cuda(0, 12)[0], want, rtol=1e-6)


def scalar_philox(seed, subsequence, offset):
    """curand's generator for one thread, in Python's integers, four words at a time."""
    counter = [offset % 2**32, offset >> 32, subsequence % 2**32, subsequence >> 32]
    key = [seed % 2**32, seed >> 32]
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * counter[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * counter[2], 2**32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


def scalar_cuda(seed, count, threads, draws):
    """torch's distribution kernel, a thread at a time: grid stride, unrolled by four."""
    grid = min(-(-count // 256), threads // 256) * 256
    out, offset = np.zeros((draws, count)), 0
    inverse, turn = np.float32(2.3283064e-10), np.float32(2.3283064e-10 * 6.2831855)
    inverse, turn = float(inverse), float(turn)  # curand_globals.h's, as A1111 multiplies them
    calls = (count - 1) // (grid * 4) + 1
    for row in out:
        for thread in range(grid):
            for call in range(calls):
                words = scalar_philox(seed, thread, offset + call)
                four = []
                for x, y in (words[:2], words[2:]):
                    radius = np.sqrt(-2 * np.log(x * inverse + inverse / 2))
                    angle = y * turn + turn / 2
                    four += [radius * np.sin(angle), radius * np.cos(angle)]
                for lane in range(4):
                    at = thread + grid * (4 * call + lane)
                    if at < count:
                        row[at] = four[lane]
        offset += calls
    return out


@pytest.mark.parametrize(("count", "threads"), [(5, 2**20), (300, 512), (700, 256), (2500, 512)])
def test_cuda_noise_follows_torchs_kernel(count, threads):
    want = scalar_cuda(2**40 + 3, count, threads, 2)
    got = torch_noise.torch_cuda(2**40 + 3, count, 2, threads)
    np.testing.assert_allclose(got, want, rtol=1.2e-7)  # float32's last bit


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(InputError, match="torch-cpu"):
        torch_noise.draw("numpy", [0], (1, 1, 1))
    with pytest.raises(InputError, match="seed"):
        torch_noise.draw("torch-cpu", [-1], (1, 1, 1))
    for sampler, said in ((DPMSolverPPSDE(), "a Brownian path"), (DPMAdaptive(eta=1.0), "choice")):
        plan = profiles.k_diffusion(Schedule(), sampler, "karras", 3)
        with pytest.raises(InputError, match=f"{type(sampler).__name__}'s noise is .*{said}"):
            torch_noise.record("torch-cpu", [0], (3, 4, 2), plan)
    with pytest.raises(InputError, match="threads"):
        torch_noise.torch_cuda(0, 16, threads=32)
