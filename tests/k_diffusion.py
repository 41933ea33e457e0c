"""k-diffusion's samplers from its equations, in float64 numpy: what trajectories are held against.

`denoise(x, sigma)` takes a float sigma; `draw(i, sigma, sigma_next, k)` is the k-th unit noise of
step i. Every function returns the final x.
"""

import math

import numpy as np


def slope(denoise, x, sigma):
    return (x - denoise(x, sigma)) / sigma


def ancestral_levels(sigma, target, eta=1.0):
    if eta == 0:
        return target, 0.0
    up = min(target, eta * (target**2 * (sigma**2 - target**2) / sigma**2) ** 0.5)
    return (target**2 - up**2) ** 0.5, up


def churned(x, sigmas, i, draw, s_churn, s_tmin, s_tmax, s_noise):
    sigma, gamma = sigmas[i], 0.0
    if s_tmin <= sigma <= s_tmax:
        gamma = min(s_churn / (len(sigmas) - 1), 2**0.5 - 1)
    hat = sigma * (1 + gamma)
    if gamma > 0:
        x = x + draw(i, sigma, hat, 0) * s_noise * (hat**2 - sigma**2) ** 0.5
    return x, hat


CHURN = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0}


def euler(denoise, x, sigmas, draw, **churn):
    for i, target in enumerate(sigmas[1:]):
        x, hat = churned(x, sigmas, i, draw, **(CHURN | churn))
        x = x + slope(denoise, x, hat) * (target - hat)
    return x


def heun(denoise, x, sigmas, draw, **churn):
    for i, target in enumerate(sigmas[1:]):
        x, hat = churned(x, sigmas, i, draw, **(CHURN | churn))
        d = slope(denoise, x, hat)
        there = x + d * (target - hat)
        if target > 0:
            there = x + (d + slope(denoise, there, target)) / 2 * (target - hat)
        x = there
    return x


def dpm_2(denoise, x, sigmas, draw, **churn):
    for i, target in enumerate(sigmas[1:]):
        x, hat = churned(x, sigmas, i, draw, **(CHURN | churn))
        d = slope(denoise, x, hat)
        if target > 0:
            mid = math.exp((math.log(hat) + math.log(target)) / 2)
            d = slope(denoise, x + d * (mid - hat), mid)
        x = x + d * (target - hat)
    return x


def euler_ancestral(denoise, x, sigmas, draw, eta=1.0, s_noise=1.0):
    for i, (sigma, target) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        down, up = ancestral_levels(sigma, target, eta)
        x = x + slope(denoise, x, sigma) * (down - sigma)
        if target > 0:
            x = x + draw(i, sigma, target, 0) * s_noise * up
    return x


def dpm_2_ancestral(denoise, x, sigmas, draw, eta=1.0, s_noise=1.0):
    for i, (sigma, target) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        down, up = ancestral_levels(sigma, target, eta)
        d = slope(denoise, x, sigma)
        if down == 0:
            x = x - d * sigma
            continue
        mid = math.exp((math.log(sigma) + math.log(down)) / 2)
        x = x + slope(denoise, x + d * (mid - sigma), mid) * (down - sigma)
        x = x + draw(i, sigma, target, 0) * s_noise * up
    return x


def lms(denoise, x, sigmas, draw, order=4):
    slopes = []
    for i, sigma in enumerate(sigmas[:-1]):
        slopes = [slope(denoise, x, sigma), *slopes][:order]
        nodes = sigmas[i::-1][: len(slopes)]
        for j, d in enumerate(slopes):
            others = np.delete(nodes, j)
            basis = np.poly1d(others, r=True) / np.prod(nodes[j] - others)
            whole = basis.integ()
            x = x + (whole(sigmas[i + 1]) - whole(sigma)) * d
    return x


def dpm_solver(denoise, x, t, t_end, order, r1=None, cache=None):
    """One DPM-Solver step of order 1, 2 or 3 in t = -log sigma; `cache` keeps evaluations."""
    cache, h = {} if cache is None else cache, t_end - t

    def eps(name, x, t):
        if name not in cache:
            cache[name] = slope(denoise, x, math.exp(-t))
        return cache[name]

    def grown(part):
        return math.exp(-t - part * h) * math.expm1(part * h)

    e = eps("e", x, t)
    if order == 1:
        return x - grown(1) * e
    r1 = r1 or (1 / 2 if order == 2 else 1 / 3)
    e1 = eps("e1", x - grown(r1) * e, t + r1 * h)
    if order == 2:
        return x - grown(1) * e - grown(1) / (2 * r1) * (e1 - e)
    r2 = 2 / 3

    def bent(part):
        return math.exp(-t - part * h) * (math.expm1(part * h) / (part * h) - 1)

    e2 = eps("e2", x - grown(r2) * e - r2 / r1 * bent(r2) * (e1 - e), t + r2 * h)
    return x - grown(1) * e - bent(1) / r2 * (e2 - e)


def fallen(t, t_next, t_end, eta):
    """How far a step of DPM-Solver goes with noise, and the noise."""
    if eta == 0:
        return t_next, 0.0
    down, _ = ancestral_levels(math.exp(-t), math.exp(-t_next), eta)
    low = min(t_end, -math.log(down)) if down > 0 else t_end
    return low, max(math.exp(-2 * t_next) - math.exp(-2 * low), 0.0) ** 0.5


def dpm_fast(denoise, x, sigma_max, sigma_min, n, draw, eta=0.0, s_noise=1.0):
    steps = n // 3 + 1
    ts = np.linspace(-math.log(sigma_max), -math.log(sigma_min), steps + 1)
    orders = [3] * (steps - 2) + [2, 1] if n % 3 == 0 else [3] * (steps - 1) + [n % 3]
    for i, (order, t, t_next) in enumerate(zip(orders, ts, ts[1:], strict=False)):
        low, up = fallen(t, t_next, ts[-1], eta)
        x = dpm_solver(denoise, x, t, low, order)
        if up:
            x = x + up * s_noise * draw(i, math.exp(-t), math.exp(-t_next), 0)
    return x


def dpm_adaptive(
    denoise,
    x,
    sigma_max,
    sigma_min,
    draw,
    order=3,
    rtol=0.05,
    atol=0.0078,
    h_init=0.05,
    pcoeff=0.0,
    icoeff=1.0,
    dcoeff=0.0,
    accept_safety=0.81,
    eta=0.0,
    s_noise=1.0,
):
    """Returns x and how often the controller accepted and rejected."""
    s, end = -math.log(sigma_max), -math.log(sigma_min)
    way = 1 if end > s else -1
    h, before, past, counts = way * abs(h_init), x, None, [0, 0]
    power = 1.5 if eta else order
    while way * (end - s) > 1e-5:
        t = way * min(way * end, way * (s + h))
        low_t, up = fallen(s, t, end, eta)
        cache = {}
        if order == 2:
            low = dpm_solver(denoise, x, s, low_t, 1, cache=cache)
            high = dpm_solver(denoise, x, s, low_t, 2, cache=cache)
        else:
            low = dpm_solver(denoise, x, s, low_t, 2, r1=1 / 3, cache=cache)
            high = dpm_solver(denoise, x, s, low_t, 3, cache=cache)
        scale = np.maximum(atol, rtol * np.maximum(np.abs(low), np.abs(before)))
        good = 1 / (np.sqrt(np.mean(((low - high) / scale) ** 2)) + 1e-8)
        past = past or [good, good]
        factor = good ** ((pcoeff + icoeff + dcoeff) / power)
        factor *= past[0] ** (-(pcoeff + 2 * dcoeff) / power) * past[1] ** (dcoeff / power)
        factor = 1 + math.atan(factor - 1)
        if factor >= accept_safety:
            before, x = low, high
            if up:
                x = x + up * s_noise * draw(0, math.exp(-s), math.exp(-t), sum(counts))
            s, past = t, [good, past[0]]
        counts[factor < accept_safety] += 1
        h *= factor
    return x, counts


def dpmpp_2s_ancestral(denoise, x, sigmas, draw, eta=1.0, s_noise=1.0):
    for i, (sigma, target) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        x0 = denoise(x, sigma)
        down, up = ancestral_levels(sigma, target, eta)
        if down == 0:
            x = x0
        else:
            h = math.log(sigma / down)
            half = math.exp(-h / 2) * x - math.expm1(-h / 2) * x0
            x = math.exp(-h) * x - math.expm1(-h) * denoise(half, sigma * math.exp(-h / 2))
        if target > 0:
            x = x + draw(i, sigma, target, 0) * s_noise * up
    return x


def dpmpp_sde(denoise, x, sigmas, draw, eta=1.0, s_noise=1.0, r=0.5):
    for i, (sigma, target) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        x0 = denoise(x, sigma)
        if target == 0:
            x = x0
            continue
        mid = math.exp((1 - r) * math.log(sigma) + r * math.log(target))
        down, up = ancestral_levels(sigma, mid, eta)
        half = down / sigma * x + (1 - down / sigma) * x0
        if up:
            half = half + draw(i, sigma, mid, 0) * s_noise * up
        x0 = (1 - 1 / (2 * r)) * x0 + 1 / (2 * r) * denoise(half, mid)
        down, up = ancestral_levels(sigma, target, eta)
        x = down / sigma * x + (1 - down / sigma) * x0
        if up:
            x = x + draw(i, sigma, target, 1) * s_noise * up
    return x


def dpmpp_2m(denoise, x, sigmas, draw):
    old = None
    for i, (sigma, target) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        x0 = used = denoise(x, sigma)
        if old is not None and target > 0:
            r = math.log(sigmas[i - 1] / sigma) / math.log(sigma / target)
            used = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * old
        x = target / sigma * x + (1 - target / sigma) * used
        old = x0
    return x


def dpmpp_2m_sde(denoise, x, sigmas, draw, solver="midpoint", eta=1.0, s_noise=1.0):
    old = h_last = None
    for i, (sigma, target) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        x0 = denoise(x, sigma)
        if target == 0:
            x = x0
            continue
        h = math.log(sigma / target)
        g = h + eta * h
        x = math.exp(-g) * x - math.expm1(-g) * x0
        if old is not None:
            weight = 1 + math.expm1(-g) / g if solver == "heun" else -math.expm1(-g) / 2
            x = x + weight * h / h_last * (x0 - old)
        if eta:
            x = (
                x
                + draw(i, sigma, target, 0) * target * (-math.expm1(-2 * eta * h)) ** 0.5 * s_noise
            )
        old, h_last = x0, h
    return x


def dpmpp_3m_sde(denoise, x, sigmas, draw, eta=1.0, s_noise=1.0):
    olds, hs = [], []
    for i, (sigma, target) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        x0 = denoise(x, sigma)
        if target == 0:
            x = x0
            continue
        h = math.log(sigma / target)
        g = h * (eta + 1)
        x = math.exp(-g) * x - math.expm1(-g) * x0
        phi2 = math.expm1(-g) / g + 1
        phi3 = phi2 / g - 0.5
        if len(hs) > 1:
            r0, r1 = hs[0] / h, hs[1] / h
            near, far = (x0 - olds[0]) / r0, (olds[0] - olds[1]) / r1
            x = x + phi2 * (near + (near - far) * r0 / (r0 + r1)) - phi3 * (near - far) / (r0 + r1)
        elif hs:
            x = x + phi2 * (x0 - olds[0]) / (hs[0] / h)
        if eta:
            x = (
                x
                + draw(i, sigma, target, 0) * target * (-math.expm1(-2 * h * eta)) ** 0.5 * s_noise
            )
        olds, hs = [x0, *olds][:2], [h, *hs][:2]
    return x


class Mixture:
    """The denoiser of a mixture of isotropic Gaussians over whole images [b, h, w, c]; it counts
    its calls.
    """

    weights, means, stds = np.array([0.4, 0.6]), np.array([-1.0, 1.5]), np.array([0.5, 0.8])

    def __init__(self):
        self.calls = 0

    def __call__(self, x, sigma):
        self.calls += 1
        total = self.stds**2 + sigma**2
        away = x[:, None] - self.means[None, :, None, None, None]
        log = -0.5 * (away**2).sum((2, 3, 4)) / total - 0.5 * x[0].size * np.log(total)
        log += np.log(self.weights)
        share = np.exp(log - log.max(1, keepdims=True))
        share /= share.sum(1, keepdims=True)
        kept = (self.stds**2 / total)[:, None, None, None]
        each = self.means[:, None, None, None] + kept * away
        return (share[..., None, None, None] * each).sum(1)


def flow(denoise, x, sigma, sigma_next, n=1000):
    """The probability-flow ODE by Runge and Kutta's fourth order, n steps even in log sigma."""

    def f(x, t):
        return denoise(x, math.exp(-t)) - x

    h = math.log(sigma / sigma_next) / n
    for i in range(n):
        t = -math.log(sigma) + i * h
        k1 = f(x, t)
        k2 = f(x + h / 2 * k1, t + h / 2)
        k3 = f(x + h / 2 * k2, t + h / 2)
        k4 = f(x + h * k3, t + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x
