"""Samplers that people use elsewhere, from ComfyUI's equations, in float64 numpy.

The form is that of k_diffusion: `draw(i, sigma, sigma_next, k)` is the k-th unit noise of step i.
"""

import math

import numpy as np
from k_diffusion import CHURN, ancestral_levels, churned, slope


def pairs(sigmas):
    return enumerate(zip(sigmas, sigmas[1:], strict=False))


def res_multistep(denoise, x, sigmas, draw, eta=0.0, s_noise=1.0):
    last = None
    for i, (sigma, target) in pairs(sigmas):
        x0 = denoise(x, sigma)
        down, up = ancestral_levels(sigma, target, eta)
        if down == 0 or last is None:
            x = x + (x - x0) / sigma * (down - sigma)
        else:
            before, its_down = last
            h = math.log(sigma / down)
            c2 = math.log(its_down / sigmas[i - 1]) / h if its_down else -math.inf
            phi1 = -math.expm1(-h) / h
            phi2 = (1 - phi1) / h
            x = math.exp(-h) * x + h * ((phi1 - phi2 / c2) * x0 + phi2 / c2 * before)
        if target > 0 and up:
            x = x + draw(i, sigma, target, 0) * s_noise * up
        last = x0, down
    return x


def euler_ancestral_cfg_pp(guided, negative, x, sigmas, draw, eta=1.0):
    for i, (sigma, target) in pairs(sigmas):
        down, up = ancestral_levels(sigma, target, eta)
        x = guided(x, sigma) + down / sigma * (x - negative(x, sigma))
        if target > 0 and up:
            x = x + draw(i, sigma, target, 0) * up
    return x


def euler_cfg_pp(guided, negative, x, sigmas, draw):
    return euler_ancestral_cfg_pp(guided, negative, x, sigmas, draw, eta=0.0)


def res_multistep_cfg_pp(guided, negative, x, sigmas, draw, eta=0.0):
    """The negative's estimate is remembered, and stepped along."""
    last = None
    for i, (sigma, target) in pairs(sigmas):
        x0, away = guided(x, sigma), negative(x, sigma)
        down, up = ancestral_levels(sigma, target, eta)
        if down == 0 or last is None:
            x = x0 + (x - away) / sigma * down
        else:
            before, its_down = last
            h = math.log(sigma / down)
            c2 = math.log(its_down / sigmas[i - 1]) / h
            phi1 = -math.expm1(-h) / h
            phi2 = (1 - phi1) / h
            x = x + (x0 - away)
            x = math.exp(-h) * x + h * ((phi1 - phi2 / c2) * away + phi2 / c2 * before)
        if target > 0 and up:
            x = x + draw(i, sigma, target, 0) * up
        last = away, down
    return x


def dpmpp_2m_cfg_pp(guided, negative, x, sigmas, draw):
    """The difference is the guided estimate's, from the negative's of the step before."""
    old = None
    for i, (sigma, target) in pairs(sigmas):
        x0, away = guided(x, sigma), negative(x, sigma)
        if target == 0:
            x = x0
        else:
            h = math.log(sigma / target)
            mix = -math.exp(-h) * away
            if old is not None:
                r = math.log(sigmas[i - 1] / sigma) / h
                mix = mix - math.expm1(-h) / (2 * r) * (x0 - old)
            x = x0 + mix + math.exp(-h) * x
        old = away
    return x


def dpmpp_2s_ancestral_cfg_pp(guided, negative, x, sigmas, draw, eta=1.0):
    """What remembers the negative is overwritten by the middle's before the second half."""
    for i, (sigma, target) in pairs(sigmas):
        x0, away = guided(x, sigma), negative(x, sigma)
        down, up = ancestral_levels(sigma, target, eta)
        if down == 0:
            x = x0
        else:
            middle = math.sqrt(sigma * down)
            half = middle / sigma * (x + x0 - away) + (1 - middle / sigma) * x0
            second, away = guided(half, middle), negative(half, middle)
            x = down / sigma * (x + x0 - away) + (1 - down / sigma) * second
        if target > 0 and up:
            x = x + draw(i, sigma, target, 0) * up
    return x


def gradient_estimation_cfg_pp(guided, negative, x, sigmas, draw, gamma=2.0):
    old = None
    for i, (sigma, target) in pairs(sigmas):
        x0 = guided(x, sigma)
        d = (x - negative(x, sigma)) / sigma
        if target == 0:
            x = x0
        else:
            x = x0 + d * target
            if i >= 1:
                x = x + (gamma - 1) * (d - old) * (target - sigma)
        old = d
    return x


def gradient_estimation(denoise, x, sigmas, draw, gamma=2.0):
    old = None
    for i, (sigma, target) in pairs(sigmas):
        d = slope(denoise, x, sigma)
        led = d if target == 0 or i == 0 else gamma * d + (1 - gamma) * old
        x, old = x + led * (target - sigma), d
    return x


def er_sde(denoise, x, sigmas, draw, order=3, scale="er", s_noise=1.0):
    f = {
        "er": lambda s: s * (np.exp(s**0.3) + 10),
        "sde": lambda s: s**2,
        "ode": lambda s: s,
    }[scale]
    old, old_slope = None, None
    for i, (s, t) in pairs(sigmas):
        x0 = denoise(x, s)
        if t == 0:
            x = x0
            continue
        r = f(t) / f(s)
        x = r * x + (1 - r) * x0
        width = (s - t) / 200
        nodes = t + np.arange(200) * width
        if order >= 2 and i >= 1:
            d = (x0 - old) / (s - sigmas[i - 1])
            x = x + (t - s + f(t) * width * np.sum(1 / f(nodes))) * d
            if order >= 3 and i >= 2:
                bend = (d - old_slope) / ((s - sigmas[i - 2]) / 2)
                whole = f(t) * width * np.sum((nodes - s) / f(nodes))
                x = x + ((t - s) ** 2 / 2 + whole) * bend
            old_slope = d
        if scale != "ode":
            x = x + draw(i, s, t, 0) * s_noise * (t**2 - (s * r) ** 2) ** 0.5
        old = x0
    return x


def p1(z):
    """z phi_1(z)."""
    return math.expm1(z)


def p2(z):
    """z phi_2(z)."""
    return (math.expm1(z) - z) / z


def longer(noise, i, sigma, levels, h, eta, draw, k):
    """The path of unit-rate noise, from a share of the step to another one."""
    here, there = levels
    if not eta:
        return 0.0
    gap = (here - there) * h * eta
    low, high = sigma * math.exp(-here * h), sigma * math.exp(-there * h)
    fresh = draw(i, low, high, k) if gap else 0.0
    return noise * math.exp(gap) + (-math.expm1(2 * gap)) ** 0.5 * fresh


def seeds_2(denoise, x, sigmas, draw, solver="phi_1", r=0.5, eta=1.0, s_noise=1.0):
    for i, (sigma, target) in pairs(sigmas):
        x0 = denoise(x, sigma)
        if target == 0:
            x = x0
            continue
        h = math.log(sigma / target)
        g, mid = h * (eta + 1), sigma * math.exp(-r * h)
        path = longer(0.0, i, sigma, (0, r), h, eta, draw, 0)
        half = math.exp(-r * g) * x - p1(-r * g) * x0 + s_noise * mid * path
        x1 = denoise(half, mid)
        if solver == "phi_1":
            b2 = p1(-g) / (2 * r)
        else:
            b2 = p2(-g) / r
        path = longer(path, i, sigma, (r, 1), h, eta, draw, 1)
        x = math.exp(-g) * x - (p1(-g) - b2) * x0 - b2 * x1 + s_noise * target * path
    return x


def exp_heun(denoise, x, sigmas, draw, solver="phi_2", eta=0.0, s_noise=1.0):
    return seeds_2(denoise, x, sigmas, draw, solver, 1.0, eta, s_noise)


def seeds_3(denoise, x, sigmas, draw, r1=1 / 3, r2=2 / 3, eta=1.0, s_noise=1.0):
    for i, (sigma, target) in pairs(sigmas):
        x0 = denoise(x, sigma)
        if target == 0:
            x = x0
            continue
        h = math.log(sigma / target)
        g = h * (eta + 1)
        mid, late = sigma * math.exp(-r1 * h), sigma * math.exp(-r2 * h)
        path = longer(0.0, i, sigma, (0, r1), h, eta, draw, 0)
        x1 = denoise(math.exp(-r1 * g) * x - p1(-r1 * g) * x0 + s_noise * mid * path, mid)
        path = longer(path, i, sigma, (r1, r2), h, eta, draw, 1)
        a2 = r2 / r1 * p2(-r2 * g)
        there = math.exp(-r2 * g) * x - (p1(-r2 * g) - a2) * x0 - a2 * x1
        x2 = denoise(there + s_noise * late * path, late)
        path = longer(path, i, sigma, (r2, 1), h, eta, draw, 2)
        b3 = p2(-g) / r2
        x = math.exp(-g) * x - (p1(-g) - b3) * x0 - b3 * x2 + s_noise * target * path
    return x


def heunpp2(denoise, x, sigmas, draw, **churn):
    last = len(sigmas) - 2
    for i, target in enumerate(sigmas[1:]):
        x, hat = churned(x, sigmas, i, draw, **(CHURN | churn))
        d = slope(denoise, x, hat)
        if i < last:
            ahead = x + d * (target - hat)
            d1 = slope(denoise, ahead, target)
            if i == last - 1:
                w1 = target / (2 * sigmas[0])
                d = (1 - w1) * d + w1 * d1
            else:
                beyond = sigmas[i + 2]
                d2 = slope(denoise, ahead + d1 * (beyond - target), beyond)
                w1, w2 = target / (3 * sigmas[0]), beyond / (3 * sigmas[0])
                d = (1 - w1 - w2) * d + w1 * d1 + w2 * d2
        x = x + d * (target - hat)
    return x


def karras(n, low, high):
    ramp = np.linspace(high ** (1 / 7), low ** (1 / 7), n)
    return np.append(ramp**7, 0.0)


def restart(denoise, x, sigmas, draw, segments=None, s_noise=1.0):
    """A1111's restart_sampler; `draw` gets the number of the rise."""
    n = len(sigmas) - 1
    if segments is None:
        segments = {}
        if n >= 20:
            more, times = (9, 1) if n < 36 else (n // 4, 2)
            sigmas = karras(n - more * times, sigmas[-2], sigmas[0])
            segments = {0.1: (more + 1, times, 2)}
    where = {int(np.argmin(abs(sigmas - low))): rest for low, rest in segments.items()}
    steps = []
    for i in range(len(sigmas) - 1):
        steps.append((sigmas[i], sigmas[i + 1]))
        if i + 1 in where:
            more, times, high = where[i + 1]
            top = int(np.argmin(abs(sigmas - high)))
            if top < i + 1:
                levels = karras(more, sigmas[i + 1], sigmas[top])[:-1]
                steps += list(zip(levels[:-1], levels[1:], strict=True)) * times
    before, rises = None, 0
    for sigma, target in steps:
        if before is not None and sigma > before * (1 + 1e-9):
            x = x + draw(rises, before, sigma, 0) * s_noise * (sigma**2 - before**2) ** 0.5
            rises += 1
        x = heun_step(denoise, x, sigma, target)
        before = target
    return x


def heun_step(denoise, x, sigma, target):
    d = slope(denoise, x, sigma)
    there = x + d * (target - sigma)
    if target > 0:
        there = x + (d + slope(denoise, there, target)) / 2 * (target - sigma)
    return there
