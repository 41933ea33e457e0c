"""Training schedules against torch diffusers, and the way between sigma and timestep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.diffusion.schedules import Schedule, alphas_cumprod, planned_timestep, to_x0
from sdjax.errors import InputError

SCHEDULES = [
    Schedule(),
    Schedule(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
    Schedule(beta_schedule="squaredcos_cap_v2"),
    Schedule(prediction="v_prediction", zero_snr=True),
    Schedule(timesteps=3, trained_betas=(0.1, 0.2, 0.3)),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tables_are_diffusers(schedule):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(clip_sample=False, **schedule.config())
    a = theirs.alphas_cumprod.numpy().astype(float)
    if schedule.zero_snr:
        a[-1] = 2.0**-24
    single = alphas_cumprod(schedule, single=True)
    assert single.dtype == np.float32
    # Rescaling subtracts: how torch's float32 sums round differs from one CPU to another.
    np.testing.assert_allclose(single, a, rtol=1e-5 if schedule.zero_snr else 3e-7)
    assert schedule.zero_snr or (single != a.astype("f")).mean() < 1e-3
    # The float64 table differs by what float32 betas lose.
    np.testing.assert_allclose(schedule.alphas_cumprod, a, rtol=1e-4 if schedule.zero_snr else 2e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_timestep_inverts_sigma_exactly_on_the_table(schedule):
    assert schedule.sigmas.dtype == np.float64 and (np.diff(schedule.sigmas) > 0).all()
    sigmas = jnp.asarray(schedule.sigmas.astype(np.float32))
    t = np.arange(schedule.timesteps)
    np.testing.assert_array_equal(schedule.timestep(sigmas), t)
    np.testing.assert_array_equal(jax.jit(schedule.timestep)(sigmas), t)
    one = jax.jit(schedule.timestep)(sigmas[1].reshape(1, 1, 1, 1))
    assert one.shape == (1, 1, 1, 1) and one.item() == 1


def test_timestep_is_logarithmic_between_and_clamped_outside():
    schedule = Schedule()
    t = np.array([0.25, 100.5, 998.75])
    np.testing.assert_allclose(schedule.timestep(schedule.sigma(t, log=True)), t, atol=2e-3)
    assert schedule.timestep(jnp.float32(1e9)) == 999 and schedule.timestep(jnp.float32(0)) == 0
    np.testing.assert_allclose(schedule.sigma(0.5), schedule.sigmas[:2].mean())


def test_stable_diffusion_has_its_known_ends():
    schedule = Schedule()
    assert schedule.sigma_min == pytest.approx(0.02917, abs=1e-5)
    assert schedule.sigma_max == pytest.approx(14.6146, abs=1e-4)


def test_sqrt_is_the_root_of_a_line():
    schedule = Schedule(beta_schedule="sqrt", beta_start=1e-6, beta_end=1e-4)
    beta = np.linspace(1e-6, 1e-4, 1000) ** 0.5
    np.testing.assert_allclose(schedule.alphas_cumprod, np.cumprod(1 - beta), rtol=1e-12)


def test_zero_snr_ends_at_the_floor_and_keeps_the_start():
    plain, zero = Schedule(), Schedule(zero_snr=True)
    assert zero.alphas_cumprod[-1] == 2.0**-24 and zero.sigma_max == pytest.approx(4096, rel=1e-6)
    assert zero.alphas_cumprod[0] == pytest.approx(plain.alphas_cumprod[0], rel=1e-12)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_network_gives_x0_back(prediction):
    rng = np.random.default_rng(0)
    x0, n = rng.standard_normal((2, 2, 3, 3, 1), np.float32)
    sigma = jnp.asarray([0.5, 40.0], jnp.float32).reshape(2, 1, 1, 1)
    x = x0 + sigma * n
    scale = jnp.sqrt(1 + sigma**2)
    out = {"epsilon": n, "v_prediction": n / scale - sigma / scale * x0, "sample": x0}[prediction]
    got = to_x0(Schedule(prediction=prediction), jnp.asarray(out), x, sigma)
    np.testing.assert_allclose(got, x0, atol=2e-5)


def test_a_plan_says_its_own_timesteps():
    schedule = Schedule()
    sigmas, timesteps = np.array([5.0, 2.0, 1.0, 0.0]), np.array([801.0, 603.0, 404.0])
    for sigma, t in zip(sigmas[:-1], timesteps, strict=True):
        assert planned_timestep(schedule, jnp.float32(sigma), sigmas, timesteps) == t
    between = jnp.float32(1.5)
    got = planned_timestep(schedule, between, sigmas, timesteps)
    assert got == schedule.timestep(between)
    each = np.stack([sigmas, sigmas + 1], 1).reshape(4, 2, 1, 1, 1)
    ts = np.stack([timesteps, timesteps + 7], 1).reshape(3, 2, 1, 1, 1)
    sigma = jnp.asarray([[2.0], [6.0]], jnp.float32).reshape(2, 1, 1, 1)
    np.testing.assert_array_equal(
        planned_timestep(schedule, sigma, each, ts).ravel(), [603.0, 808.0]
    )
    shared = planned_timestep(schedule, sigma, sigmas, timesteps).ravel()
    assert shared[0] == 603 and shared[1] == schedule.timestep(jnp.float32(6.0))


def test_configs_survive_the_round_trip():
    for schedule in SCHEDULES:
        assert Schedule.from_config(schedule.config()) == schedule
        assert hash(Schedule.from_config(schedule.config())) == hash(schedule)


def test_defaults_are_the_class_own():
    assert Schedule.from_config({"_class_name": "DDIMScheduler"}).beta_end == 0.02
    assert Schedule.from_config({"_class_name": "LCMScheduler"}).beta_schedule == "scaled_linear"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"timesteps": 0}, "num_train_timesteps"),
        ({"timesteps": 100_001}, "num_train_timesteps"),
        ({"beta_end": 1.0}, "beta_end"),
        ({"beta_start": -0.1}, "beta_start"),
        ({"trained_betas": (0.1,)}, "trained_betas"),
        ({"beta_schedule": "x"}, "beta_schedule"),
        ({"prediction": "x"}, "prediction_type"),
        ({"beta_start": 0.9, "beta_end": 0.99}, "beta_end: no signal"),
        ({"timesteps": 1, "zero_snr": True}, "rescale_betas_zero_snr"),
    ],
)
def test_impossible_schedules_are_refused(change, key):
    with pytest.raises(InputError, match=key):
        Schedule(**change)
