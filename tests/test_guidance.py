"""Guidance as Denoiser -> Denoiser, against closed forms and diffusers' own guiders."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from peers import QUICK, nchw, nhwc

from sdjax.diffusion import guidance, methods, names, noise, projection, sampling, spacings
from sdjax.diffusion.samplers import (
    DDIM,
    PNDM,
    DPMAdaptive,
    DPMSolverPP2M,
    Euler,
    EulerAncestral,
    Heun,
)
from sdjax.errors import InputError
from sdjax.types import leaves32

X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 2, 1), np.float32))
quick = functools.partial(jax.jit, compiler_options=QUICK)


def _conditioned(context, x, sigma):
    return x * context[:, None, None, None] + sigma


CONTEXT = jnp.asarray([1.0, 2.0, 3.0, 10.0, 20.0, 30.0])  # negatives first


@pytest.mark.parametrize("scale", [7.5, [1.0, 2.0, 0.0]])
@pytest.mark.parametrize("sigma", [0.5, [0.5, 1.0, 2.0]])
def test_cfg_extrapolates_from_negative_to_positive(scale, sigma):
    sigma = jnp.asarray(sigma)
    sigma = sigma.reshape(-1, 1, 1, 1) if sigma.ndim else sigma
    denoise = guidance.cfg(Partial(_conditioned, CONTEXT), jnp.asarray(scale))
    got = jax.jit(lambda f, x, s: f(x, s))(denoise, X, sigma)
    negative, positive = _conditioned(CONTEXT[:3], X, sigma), _conditioned(CONTEXT[3:], X, sigma)
    w = np.asarray(scale).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(got, negative + w * (positive - negative), rtol=2e-6, atol=1e-5)


def test_a_scale_per_image_may_already_be_shaped():
    a = guidance.cfg(Partial(_conditioned, CONTEXT), jnp.arange(3.0))(X, jnp.float32(1))
    b = guidance.cfg(Partial(_conditioned, CONTEXT), jnp.arange(3.0).reshape(3, 1, 1, 1))
    np.testing.assert_array_equal(a, b(X, jnp.float32(1)))


def test_new_scales_and_contexts_share_a_program():
    traces = []

    @jax.jit
    def run(denoise, x):
        traces.append(1)
        return denoise(x, jnp.float32(1))

    for i in range(3):
        run(guidance.cfg(Partial(_conditioned, CONTEXT + i), jnp.float32(i)), X)
    assert len(traces) == 1


def test_plain_functions_are_denoisers_too():
    clipped = guidance.clip(lambda x, sigma: x * 100, 1.0)
    assert jnp.abs(jax.jit(lambda f: f(X, jnp.float32(1)))(clipped)).max() == 1


# Estimates that do not depend on x: what each side says, and how often it was asked.
SIDES = np.random.default_rng(1).standard_normal((4, 3, 4, 4, 2)).astype(np.float32)
NOISY = jnp.asarray(np.random.default_rng(2).standard_normal((3, 4, 4, 2), np.float32)) * 3
SIGMA = jnp.asarray([0.3, 1.0, 4.0]).reshape(3, 1, 1, 1)


def _says(table, x, sigma):
    return jnp.asarray(table) + 0 * x


def saying(*rows):
    return Partial(_says, np.concatenate([SIDES[i] for i in rows]))


def counting(denoise, asked, name):
    def call(x, sigma):
        jax.debug.callback(lambda: asked.append(name))
        return denoise(x, sigma)

    return call


def test_a_schedule_of_scales_has_one_for_each_step():
    """Throughout a step, its midpoints included; one schedule for all, or one an image."""
    levels, scales = np.array([8.0, 4.0, 2.0, 0.0]), np.array([1.0, 5.0, 3.0])
    at = guidance.PerStep(levels, scales)
    for sigma, want in ((9, 1), (8, 1), (5, 1), (4, 5), (3, 5), (2, 3), (0.1, 3)):
        assert at(jnp.float32(sigma)) == want
    np.testing.assert_array_equal(at(jnp.float32([8, 3, 1]).reshape(3, 1, 1, 1)).ravel(), [1, 5, 3])
    rows = spacings.pad([levels, levels / 2])
    own = guidance.PerStep(rows, spacings.pad([scales, scales * 10], 3))
    np.testing.assert_array_equal(own(jnp.full((2, 1, 1, 1), 3.0)).ravel(), [5, 10])
    np.testing.assert_array_equal(own(jnp.float32(3)).ravel(), [5, 10])


def test_steps_without_guidance_cost_one_evaluation():
    """By a schedule of scales, and by an interval; images on both sides of it get their own."""
    levels = np.array([8.0, 4.0, 2.0, 0.0], np.float32)
    asked = []
    both, one = counting(saying(0, 1), asked, "both"), counting(saying(1), asked, "one")
    scaled = guidance.cfg(both, guidance.PerStep(levels, np.array([1.0, 3.0, 1.0])), one)
    limited = guidance.interval(guidance.cfg(both, 3.0), one, 2.0, 4.0)
    for denoise in (scaled, limited):
        asked.clear()
        quick(sampling.sample)(leaves32(Euler()), denoise, NOISY, levels).block_until_ready()
        jax.effects_barrier()
        assert asked == ["one", "both", "one"]
    mixed = quick(lambda x, s: limited(x, s))(NOISY, jnp.float32([1, 3, 9]).reshape(3, 1, 1, 1))
    want = SIDES[1].copy()
    want[1] = SIDES[0][1] + 3 * (SIDES[1][1] - SIDES[0][1])
    np.testing.assert_allclose(mixed, want, rtol=1e-5, atol=1e-5)


def test_cfg_plus_plus_is_its_algorithm():
    """Chung et al., algorithm 2, in alpha-bar form: the negative's noise, the guided image."""
    sigmas = spacings.karras(5, 0.2, 9.0).astype(np.float32)
    weight = 0.6
    vp = np.asarray(NOISY, np.float64) / np.sqrt(1 + sigmas[0] ** 2.0)

    def slanted(context, x, sigma):
        return jnp.tanh(x * context[:, None, None, None])

    context = jnp.asarray([0.2, 0.3, 0.4, 0.9, 0.8, 0.7])
    for a, b in zip(sigmas[:-1], sigmas[1:], strict=True):
        bar, bar_next = 1 / (1 + float(a) ** 2), 1 / (1 + float(b) ** 2)
        x = vp / np.sqrt(bar)
        negative = np.tanh(x * np.asarray(context[:3])[:, None, None, None])
        positive = np.tanh(x * np.asarray(context[3:])[:, None, None, None])
        noise_negative = (vp - np.sqrt(bar) * negative) / np.sqrt(1 - bar)
        noise_positive = (vp - np.sqrt(bar) * positive) / np.sqrt(1 - bar)
        guided = noise_negative + weight * (noise_positive - noise_negative)
        x0 = (vp - np.sqrt(1 - bar) * guided) / np.sqrt(bar)
        vp = np.sqrt(bar_next) * x0 + np.sqrt(1 - bar_next) * noise_negative
    denoise = guidance.cfg_plus_plus(Partial(slanted, context), weight, sigmas)
    got = quick(sampling.sample)(leaves32(Euler()), denoise, NOISY, sigmas)
    np.testing.assert_allclose(got, vp, rtol=2e-5, atol=2e-5)
    padded = guidance.cfg_plus_plus(Partial(slanted, context), weight, np.append(sigmas, [0, 0]))
    assert np.isfinite(padded(NOISY, jnp.float32(0.2))).all()


def test_cfg_plus_plus_goes_down_as_far_as_the_sampler():
    """Under Euler ancestral and DDIM's eta: the negative's direction down, then noise."""
    a, b, weight = 3.0, 1.0, 0.6
    up = 0.8 * b * np.sqrt(1 - (b / a) ** 2)
    down = np.sqrt(b**2 - up**2)
    fresh = np.random.default_rng(5).standard_normal(NOISY.shape).astype(np.float32)
    x0 = SIDES[0] + weight * (SIDES[1] - SIDES[0])
    want = x0 + down / a * (NOISY - SIDES[0]) + up * fresh
    sigmas = np.float32([a, b])
    denoise = guidance.cfg_plus_plus(saying(0, 1), weight, sigmas, eta=0.8)
    for sampler in (EulerAncestral(0.8), DDIM(0.8)):
        got = sampling.sample(sampler, denoise, NOISY, sigmas, noise.Tape(fresh[None]))
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_cfg_plus_plus_by_name_is_the_samplers_own():
    """An ancestral sampler's eta; the sampler's own CFG++ form, where it has one."""
    levels, fresh = np.float32([8.0, 4.0, 2.0]), np.random.default_rng(6).standard_normal
    tape = noise.Tape(fresh((2, *NOISY.shape)).astype(np.float32))
    sides = methods.Sides(saying(0, 1), saying(1), levels)

    def by_name(sampler):
        method = methods.METHODS["cfg_plus_plus"].suited(sampler)
        return sampling.sample(method.around(sampler), method(sides, 0.6), NOISY, levels, tape)

    denoise = guidance.cfg_plus_plus(saying(0, 1), 0.6, levels, eta=0.8)
    want = sampling.sample(EulerAncestral(0.8), denoise, NOISY, levels, tape)
    np.testing.assert_allclose(by_name(EulerAncestral(0.8)), want, rtol=1e-6)
    plain = guidance.cfg(saying(0, 1), 0.6)
    want = sampling.sample(DPMSolverPP2M(plus_plus=True), plain, NOISY, levels)
    np.testing.assert_allclose(by_name(DPMSolverPP2M()), want, rtol=1e-6)


def test_composed_prompts_add_up():
    got = guidance.composed(saying(0, 1, 2, 3), [3.0, -1.0, 0.5])(NOISY, SIGMA)
    want = SIDES[0] + sum(w * (SIDES[i + 1] - SIDES[0]) for i, w in enumerate([3.0, -1.0, 0.5]))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    one = guidance.composed(saying(0, 1), 7.5)(NOISY, SIGMA)
    np.testing.assert_allclose(one, guidance.cfg(saying(0, 1), 7.5)(NOISY, SIGMA), rtol=1e-6)
    each = guidance.composed(saying(0, 1), [jnp.arange(3.0).reshape(3, 1, 1, 1)])(NOISY, SIGMA)
    np.testing.assert_allclose(each[0], SIDES[0][0], rtol=1e-6)


def test_scales_may_be_mapped_over():
    """One program for many guidance scales."""
    sigmas = np.array([4.0, 1.0, 0.0], np.float32)

    def run(scale):
        return sampling.sample(Euler(), guidance.cfg(saying(0, 1), scale), NOISY, sigmas)

    many = quick(jax.vmap(run))(jnp.float32([1, 7.5]))
    for scale, x in zip((1, 7.5), many, strict=True):
        np.testing.assert_allclose(
            x, SIDES[0] + scale * (SIDES[1] - SIDES[0]), rtol=1e-4, atol=1e-5
        )


def test_autoguidance_goes_away_from_the_worse_model():
    got = guidance.autoguidance(saying(1), saying(0), 2.5)(NOISY, SIGMA)
    np.testing.assert_allclose(got, 2.5 * SIDES[1] - 1.5 * SIDES[0], rtol=1e-5, atol=1e-5)


def test_thresholding_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    x0 = jnp.asarray(SIDES[0]) * jnp.float32([0.2, 1, 4]).reshape(3, 1, 1, 1)
    for ratio, maximum in ((0.9, 1.5), (0.995, 50.0), (0.5, 1.0)):
        scheduler = diffusers.DDIMScheduler(
            thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=maximum
        )
        want = nhwc(scheduler._threshold_sample(nchw(x0)))
        got = guidance.threshold(lambda x, s: x0, ratio, 1.0, maximum)(NOISY, SIGMA)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    other = guidance.threshold(lambda x, s: x0, 0.9, 2.0)(NOISY, SIGMA)
    assert np.abs(other).max() == pytest.approx(2.0)


def test_rematerialised_gradients_are_the_same_and_keep_less():
    """Eight layers in the network, eight steps: only x is kept from step to step."""

    def deep(w, x, sigma):
        for _ in range(8):
            x = jnp.tanh(x * w)
        return x

    sigmas = spacings.karras(8, 0.1, 5.0).astype(np.float32)
    wide = jnp.ones((2, 16, 16, 4))

    def loss(w, denoise):
        return jnp.sum(sampling.sample(Euler(), denoise(Partial(deep, w)), wide, sigmas) ** 2)

    programs = [
        jax.jit(jax.grad(functools.partial(loss, denoise=d))).lower(jnp.float32(0.7)).compile()
        for d in (guidance.remat, guidance.partial)
    ]
    lean, plain = (p.memory_analysis().temp_size_in_bytes for p in programs)
    assert lean < plain / 2
    a, b = (p(jnp.float32(0.7)) for p in programs)
    np.testing.assert_allclose(a, b, rtol=1e-5)


# Where diffusers takes the network's prediction, so do these.
def predicted(kind, rows):
    """The sides' predictions of one kind, as torch has them."""
    x, sigma = np.asarray(NOISY), np.asarray(SIGMA)
    alpha = 1 / np.sqrt(1 + sigma**2)
    noises = [(x - SIDES[i]) / sigma for i in rows]
    if kind == "sample":
        return [nchw(SIDES[i]) for i in rows]
    if kind == "epsilon":
        return [nchw(n) for n in noises]
    return [nchw(alpha * n - sigma * alpha * SIDES[i]) for n, i in zip(noises, rows, strict=True)]


def estimated(kind, out):
    """diffusers' way back to x0, from variance-preserving latents."""
    x, sigma, out = np.asarray(NOISY), np.asarray(SIGMA), nhwc(out)
    alpha = 1 / np.sqrt(1 + sigma**2)
    if kind == "sample":
        return out
    if kind == "epsilon":
        return (x * alpha - sigma * alpha * out) / alpha
    return alpha * (x * alpha) - sigma * alpha * out


KINDS = ("sample", "epsilon", "v_prediction")


def guider(name, **options):
    guiders = pytest.importorskip("diffusers.guiders")
    one = getattr(guiders, name)(**options)
    one._step = 5  # past the steps that stand still
    return one


@pytest.mark.parametrize("kind", KINDS)
def test_nonlinear_guidance_is_that_of_diffusers_guiders(kind):
    negative, positive = predicted(kind, (0, 1))
    pair = saying(0, 1)
    cases = [
        (
            guider("ClassifierFreeGuidance", guidance_scale=4.0, guidance_rescale=0.7),
            projection.rescale(pair, 4.0, 0.7, kind),
        ),
        (
            guider("ClassifierFreeZeroStarGuidance", guidance_scale=4.0),
            projection.zero_star(pair, 4.0, prediction=kind),
        ),
        (
            guider("TangentialClassifierFreeGuidance", guidance_scale=4.0),
            projection.tangential(pair, 4.0, kind),
        ),
        # The paper's scale counts from the positive; diffusers calls that the original.
        (
            guider(
                "AdaptiveProjectedGuidance",
                guidance_scale=3.0,
                eta=0.3,
                adaptive_projected_guidance_rescale=2.0,
                use_original_formulation=True,
            ),
            projection.apg(pair, 4.0, eta=0.3, norm=2.0, prediction=kind),
        ),
    ]
    for theirs, ours in cases:
        want = estimated(kind, theirs.forward(positive, negative).pred)
        got = quick(lambda f: f(NOISY, SIGMA))(ours)
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_apg_has_diffusers_momentum_from_step_to_step():
    """Euler under APG with momentum -0.5, three steps, against the guider fed with x0."""
    theirs = guider(
        "AdaptiveProjectedGuidance",
        guidance_scale=3.0,
        eta=0.0,
        adaptive_projected_guidance_momentum=-0.5,
        adaptive_projected_guidance_rescale=3.0,
        use_original_formulation=True,
    )
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer

    theirs.momentum_buffer = MomentumBuffer(-0.5)
    sigmas = np.array([6.0, 3.0, 1.0, 0.0], np.float32)

    def moving(x, sigma):
        rows = jnp.concatenate([jnp.asarray(SIDES[0]), jnp.asarray(SIDES[1])])
        return jnp.tanh(x * 0.3 + rows * sigma)

    x = np.asarray(NOISY)
    for a, b in zip(sigmas[:-1], sigmas[1:], strict=True):
        negative, positive = (
            nchw(np.tanh(x * 0.3 + SIDES[i] * a).astype(np.float32)) for i in (0, 1)
        )
        x0 = nhwc(theirs.forward(positive, negative).pred)
        x = x0 + b / a * (x - x0)
    denoise = projection.apg(moving, 4.0, norm=3.0)
    sampler = projection.Momentum(Euler(), -0.5)
    got = quick(sampling.sample)(leaves32(sampler), denoise, NOISY, sigmas)
    np.testing.assert_allclose(got, x, rtol=2e-5, atol=2e-5)
    clipped = guidance.clip(denoise, 100.0)
    near = quick(sampling.sample)(leaves32(sampler), clipped, NOISY, sigmas)
    np.testing.assert_allclose(near, got, rtol=1e-5, atol=1e-5)
    none = projection.Momentum(Heun(), 0.0)
    plain = quick(sampling.sample)(leaves32(Heun()), denoise, NOISY, sigmas)
    both = quick(sampling.sample)(leaves32(none), denoise, NOISY, sigmas)
    np.testing.assert_allclose(both, plain, rtol=1e-5, atol=1e-5)


def test_cfg_zero_star_stands_still_above_its_level():
    denoise = projection.zero_star(saying(0, 1), 4.0, above=2.0)
    got = denoise(NOISY, SIGMA)
    np.testing.assert_allclose(got[2], NOISY[2], rtol=1e-6)
    assert not np.allclose(got[:2], NOISY[:2])
    flow = projection.zero_star(saying(0, 1), 4.0, above=0.0)
    x = sampling.sample(Euler(), flow, NOISY, np.array([2.0, 1.0], np.float32))
    np.testing.assert_allclose(x, NOISY, rtol=1e-6)


def test_a_perpendicular_negative_leaves_the_positive_alone():
    """Perp-Neg's formula; a negative along the positive changes nothing, and cfg's remains."""
    empty, negative, positive = SIDES[0], SIDES[1], SIDES[2]
    got = projection.perp_neg(saying(0, 1, 2), 5.0, 0.8)(NOISY, SIGMA)
    for i in range(3):
        p, n = (positive - empty)[i].ravel(), (negative - empty)[i].ravel()
        away = n - (n @ p) / (p @ p) * p
        want = empty[i].ravel() + 5.0 * (p - 0.8 * away)
        np.testing.assert_allclose(got[i].ravel(), want, rtol=1e-4, atol=1e-4)
    along = Partial(_says, np.concatenate([empty, empty + 3 * (positive - empty), positive]))
    got = projection.perp_neg(along, 5.0)(NOISY, SIGMA)
    want = guidance.cfg(saying(0, 2), 5.0)(NOISY, SIGMA)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


MAKERS = (
    lambda d: projection.rescale(d, 4.0),
    lambda d: projection.apg(d, 4.0, norm=1.0),
    lambda d: projection.zero_star(d, 4.0),
    lambda d: projection.tangential(d, 4.0),
    lambda d: guidance.threshold(guidance.cfg(d, 4.0), 0.9, limit=0.5),
)


def test_equal_sides_are_left_alone_with_finite_gradients():
    """No direction to project on, no deviation to keep: nothing divides by 0."""

    @quick
    def slopes(x):
        def loss(x, make):
            return jnp.sum(make(lambda x, s: x * 0.5)(x, jnp.float32(1)) ** 2)

        return [jax.value_and_grad(loss)(x, make) for make in MAKERS[:4]]

    for x in (NOISY, jnp.zeros_like(NOISY)):
        for value, slope in slopes(x):
            np.testing.assert_allclose(value, jnp.sum((x * 0.5) ** 2), rtol=1e-5)
            assert np.isfinite(slope).all()


def test_images_are_guided_apart():
    """Reductions are an image's own: each comes out as it would alone."""

    @quick
    def both(table, x, sigma, alone, x_alone, sigma_alone):
        whole = [make(Partial(_says, table))(x, sigma)[1:2] for make in MAKERS]
        return whole, [make(Partial(_says, alone))(x_alone, sigma_alone) for make in MAKERS]

    alone = np.stack([SIDES[0][1], SIDES[1][1]])
    pairs = both(np.concatenate(SIDES[:2]), NOISY, SIGMA, alone, NOISY[1:2], SIGMA[1:2])
    for whole, one in zip(*pairs, strict=True):
        np.testing.assert_allclose(whole, one, rtol=1e-5, atol=1e-5)


def test_unknown_predictions_and_denoisers_are_refused():
    with pytest.raises(InputError, match="v_prediction"):
        projection.rescale(saying(0, 1), 4.0, prediction="flow")
    with pytest.raises(InputError, match="apg"):
        sampling.sample(
            projection.Momentum(Euler()), saying(1), NOISY, np.array([1.0, 0.0], np.float32)
        )
    with pytest.raises(InputError, match="DPMAdaptive asks for estimates in a loop"):
        sampling.sample(
            projection.Momentum(DPMAdaptive()), projection.apg(saying(0, 1), 4.0), NOISY, LEVELS
        )


LEVELS = np.array([8.0, 4.0, 2.0, 0.0], np.float32)


def test_apg_goes_with_plms_which_estimates_in_a_loop():
    """Without momentum it is PLMS along APG's estimates; with it, another run."""

    def run(momentum):
        method = methods.AdaptiveProjected(norm=50.0, momentum=momentum)
        sampler = leaves32(method.around(PNDM()))
        return quick(sampling.sample)(sampler, method(saying(0, 1), 4.0), NOISY, LEVELS)

    want = quick(sampling.sample)(
        PNDM(), projection.apg(saying(0, 1), 4.0, norm=50.0), NOISY, LEVELS
    )
    np.testing.assert_allclose(run(0.0), want, rtol=1e-5, atol=1e-5)
    assert np.abs(run(-0.5) - want).max() > 1e-3


def test_methods_for_tasks_know_the_run_and_the_prompts_own_network():
    """By steps, by an interval, and CFG++: at each level, with the evaluations that it takes."""
    asked = []
    sides = methods.Sides(
        counting(saying(0, 1), asked, "both"), counting(saying(1), asked, "one"), LEVELS
    )
    each = jnp.full((3, 1, 1, 1), 3.0)
    cases = (
        (methods.scheduled(sides, each, np.array([0.0, 1.0, 0.5])), (1, 3, 2)),
        (methods.limited(sides, each, 2.0, 4.0), (1, 3, 1)),
        (methods.limited(sides, each, 2.0, 4.0, projection.apg), None),
        (methods.CFGPlusPlus()(sides, each / 5), (1.2, 1.2, 0.6)),
    )
    for denoise, scales in cases:
        asked.clear()
        got = [denoise(NOISY, jnp.float32(level)) for level in LEVELS[:3]]
        jax.effects_barrier()
        if scales is None:
            wanted = [SIDES[1], projection.apg(saying(0, 1), 3.0)(NOISY, jnp.float32(4)), SIDES[1]]
            scales = (1, 3, 1)
        else:
            wanted = [SIDES[0] + w * (SIDES[1] - SIDES[0]) for w in scales]
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
        if isinstance(scales[0], int):
            assert asked == ["one" if w == 1 else "both" for w in scales]


def test_numbers_of_a_method_are_leaves_and_its_words_belong_to_the_program():
    def leaves(**asked):
        method = methods.prepared(functools.partial(projection.apg, **asked))
        return jax.tree.leaves(method), jax.tree.structure(method)

    numbers, program = leaves(eta=0.5, norm=2, prediction="epsilon")
    assert numbers == [0.5, 2]
    assert leaves(eta=1.0, norm=3, prediction="epsilon")[1] == program
    assert leaves(eta=1.0, norm=3, prediction="sample")[1] != program
    asked = dict(eta=0.5, norm=2.0, prediction="epsilon")
    method = methods.restored(methods.prepared(Partial(projection.apg, **asked)))
    want = projection.apg(saying(0, 1), 3.0, **asked)(NOISY, SIGMA)
    np.testing.assert_array_equal(method(saying(0, 1), 3.0)(NOISY, SIGMA), want)


def test_methods_have_names():
    assert tuple(methods.METHODS) == names.GUIDANCE
    for name in names.GUIDANCE:
        method = methods.restored(methods.prepared(name, "v_prediction"))
        count = getattr(method, "sides", 2)
        sides = methods.Sides(saying(*range(count)), saying(count - 1), LEVELS)
        assert np.isfinite(method(sides, jnp.full((3, 1, 1, 1), 0.5))(NOISY, SIGMA)).all()
    assert methods.is_cfg(methods.prepared(None)) and methods.is_cfg(methods.prepared("cfg"))


@pytest.mark.parametrize(
    "bad, word",
    [
        ("agp", "guidance must be one of cfg, rescale, apg.*got 'agp'"),
        (methods.Perpendicular, "a function"),
        (lambda denoise: denoise, "a function"),
        (7.5, "a function"),
        (Partial(projection.apg, prediction={1}), "neither a number nor hashable"),
    ],
)
def test_what_is_no_method_is_refused(bad, word):
    with pytest.raises(InputError, match=word):
        methods.prepared(bad)
