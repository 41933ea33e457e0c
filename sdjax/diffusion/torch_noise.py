"""Noise of other programs, from a seed: what torch's generators draw, computed on the host.

A seed found elsewhere gives the same picture here. diffusers draws with
`torch.Generator(device).manual_seed(seed)`, one generator an image; ComfyUI always, and A1111 by a
setting, on the CPU; A1111 otherwise on CUDA, or by numpy as CUDA would. All of them draw [c, h, w].
"""

from collections.abc import Sequence

import numpy as np

from sdjax.diffusion.noise import Tape
from sdjax.diffusion.plan import Plan
from sdjax.diffusion.samplers import Restart
from sdjax.diffusion.trajectories import draws as draws_of
from sdjax.diffusion.trajectories import may_draw
from sdjax.errors import InputError
from sdjax.types import Sampler

NAMES = ("torch-cpu", "torch-cuda")

_BLOCK = 256  # threads in a block, and
_Float = np.ndarray | np.float32 | float
_UNROLL = 4  # numbers a thread draws at once: aten/src/ATen/native/cuda/DistributionTemplates.h


def draw(
    name: str, seeds: Sequence[int], shape: tuple[int, int, int], draws: int = 1
) -> np.ndarray:
    """Unit noise [draws, b, h, w, c], float32: successive `torch.randn(1, c, h, w)` of each seed.

    `shape` is one image's (h, w, c). The first draw is the start; where a sampler draws at every
    step, diffusers and k-diffusion take the following ones from the same generator, in order
    (`noise.Tape(drawn[1:])`). A pipeline in float16 rounds every draw to that.
    """
    if name not in NAMES:
        raise InputError(f"noise must be one of {', '.join(NAMES)}, got {name!r:.60}")
    height, width, channels = shape
    count = height * width * channels
    one = torch_cpu if name == "torch-cpu" else torch_cuda
    drawn = np.stack([one(_seed(seed), count, draws) for seed in seeds], axis=1)
    rows = drawn.reshape(draws, len(seeds), channels, height, width)
    return np.ascontiguousarray(np.moveaxis(rows, 2, -1))


def record(
    name: str, seeds: Sequence[int], shape: tuple[int, int, int], plan: Plan
) -> tuple[np.ndarray, Tape | None]:
    """The start [b, h, w, c] of one image's plan for each seed, and what its steps then draw; None
    if nothing.

    `shape` is one image's. A step draws as often as the sampler does, also where it makes no use of
    it; but of `Restart` only where levels rise, as in A1111. White noise is what diffusers draws
    for the multistep solvers of the SDE; k-diffusion and A1111 take theirs from torchsde's Brownian
    tree, which is not repeated here.

    Raises:
        InputError: as `per_step`.
    """
    each = per_step(name, plan.sampler)
    turn = np.arange(len(plan.sigmas) - 1)
    if isinstance(plan.sampler, Restart):
        rises = np.diff(plan.sigmas) > 0
        turn = np.cumsum(rises) - rises
    start, *later = draw(name, seeds, shape, 1 + each * (int(turn[-1]) + 1))
    if not each:
        return start, None
    return start, Tape(np.stack(later).reshape(-1, each, *start.shape)[turn])


def per_step(name: str, sampler: Sampler) -> int:
    """How often a sampler draws in a step.

    Raises:
        InputError: its draws are of one Brownian path within the step, or it chooses its steps and
            draws at each, so that noise in turn is not its noise.
    """
    each = draws_of(sampler, (8, 8, 4))
    path = each > 1 and getattr(sampler, "brownian", False)
    if path or (not each and may_draw(sampler)):
        why = "of a Brownian path" if path else "drawn at steps of its own choice"
        raise InputError(
            f"{type(sampler).__name__}'s noise is {why}, which {name} cannot repeat: leave noise "
            "out, or take another sampler"
        )
    return each


def torch_cpu(seed: int, count: int, draws: int = 1) -> np.ndarray:
    """`torch.randn(count)` on the CPU, `draws` times: [draws, count], bit for bit.

    The generator is mt19937 with the lower 32 bits of the seed (Matsumoto and Nishimura 1998). From
    16 values on, uniforms of 24 bits fill the tensor, then blocks of 16 become normal by Box and
    Muller's method with the polynomials of torch's AVX2 code; where 16 does not divide the count,
    the last 16 are drawn anew. Below 16, pairs come from uniforms of 53 bits, and half a pair waits
    for the next draw. Processors without AVX2 use other logarithms, and differ in the last bits.
    """
    source = np.random.RandomState(seed % 2**32)
    if count < 16:
        return _pairs(source, draws * count).reshape(draws, count)
    return np.stack([_blocks(source, count) for _ in range(draws)])


def torch_cuda(seed: int, count: int, draws: int = 1, threads: int | None = None) -> np.ndarray:
    """`torch.randn(count)` on CUDA, `draws` times: [draws, count], and A1111's NV noise.

    The generator is Philox4x32-10 (Salmon et al. 2011, SC11) as curand has it: the seed is the key,
    the thread's number the upper half of the counter, and each call moves the lower half on by one.
    A thread makes four values, which stand a whole grid apart: with a thread for each value, as
    for an image's latents on a large GPU, only the first is used, and that is what A1111 imitates.
    `threads` is how many the GPU holds (its multiprocessors times 1024, 1536 or 2048), for tensors
    that are larger; None is enough for any.

    The random words are exact. Their logarithm and sine are taken in float64 and rounded once, as
    A1111 does; a GPU's own approximations (`__sincosf`, `logf`) are about 1e-6 away.
    """
    blocks = -(-count // _BLOCK)
    if threads is not None:
        if threads < _BLOCK:
            raise InputError(f"threads must be at least {_BLOCK}, got {threads}")
        blocks = min(blocks, threads // _BLOCK)
    grid = blocks * _BLOCK
    calls = -(-count // (grid * _UNROLL))
    lanes = _UNROLL if count > grid else 1
    keys = np.array([seed % 2**32, seed >> 32], np.uint32)
    thread = np.arange(grid, dtype=np.uint32)
    out = np.empty((draws, calls, lanes, grid), np.float32)
    for call in range(draws * calls):
        counter = np.zeros((4, grid), np.uint32)
        counter[0], counter[2] = call, thread
        a, b, c, d = philox(counter, keys)
        normal = [*_normal(a, b), *_normal(c, d)][:lanes]
        out[call // calls, call % calls] = normal
    return out.reshape(draws, -1)[:, :count]


def philox(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox4x32-10 of Salmon et al. 2011 (SC11), section 3.3: uint32 counters [4, n] and a key [2]
    to random words [4, n].
    """
    c0, c1, c2, c3 = (row.astype(np.uint64) for row in counter)
    k0, k1 = (int(k) for k in key)
    low = np.uint64(2**32 - 1)
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & low,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def _normal(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two words to two normals: curand's Box-Muller, in float64 with its float32 constants."""
    turn = np.float64(np.float32(2.0**-32 * 6.2831855))
    radius = np.sqrt(-2.0 * np.log(u * 2.0**-32 + 2.0**-33))
    angle = v * turn + turn / 2
    return (radius * np.sin(angle)).astype(np.float32), (radius * np.cos(angle)).astype(np.float32)


def _words(source: np.random.RandomState, count: int) -> np.ndarray:
    return source.randint(0, 2**32, count, dtype=np.uint32)


def _pairs(source: np.random.RandomState, count: int) -> np.ndarray:
    """Fewer than 16 values: ATen/core/DistributionsHelper.h's normal_distribution<double>."""
    words = _words(source, 4 * -(-count // 2)).astype(np.uint64).reshape(-1, 2, 2)
    bits = (words[..., 0] << np.uint64(32) | words[..., 1]) & np.uint64(2**53 - 1)
    u = bits.astype(np.float64) * 2.0**-53
    radius, angle = np.sqrt(-2.0 * np.log1p(-u[:, 1])), 2.0 * np.pi * u[:, 0]
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return pairs.reshape(-1)[:count].astype(np.float32)


def _blocks(source: np.random.RandomState, count: int) -> np.ndarray:
    """16 values or more: ATen/native/cpu/DistributionTemplates.h's normal_fill."""
    uniform = (_words(source, count) & np.uint32(2**24 - 1)).astype(np.float32) * np.float32(2**-24)
    whole = count - count % 16
    out = np.empty(count, np.float32)
    out[:whole] = _muller(uniform[:whole])
    if whole < count:
        tail = (_words(source, 16) & np.uint32(2**24 - 1)).astype(np.float32)
        out[-16:] = _muller(tail * np.float32(2**-24))
    return out


def _muller(uniform: np.ndarray) -> np.ndarray:
    """Blocks of 16: the first eight are radii, the last eight angles."""
    u, v = np.moveaxis(uniform.reshape(-1, 2, 8), 1, 0)
    radius = np.sqrt(np.float32(-2) * _log(np.float32(1) - u))
    sine, cosine = _sincos(np.float32(2 * np.pi) * v)
    return np.stack([radius * cosine, radius * sine], axis=1).reshape(-1)


def _log(x: np.ndarray) -> np.ndarray:
    """Cephes' logf in eight lanes (avx_mathfun.h), with the fused multiply-adds of the shipped
    builds: every product that is added to something, and of two the first.
    """
    half, exponent = np.frexp(x)
    low = half < np.float32(0.707106781186547524)
    e = np.where(low, exponent - 1, exponent).astype(np.float32)
    x = np.where(low, half + half, half) - np.float32(1)
    z = x * x
    y: np.ndarray | np.float32 = np.float32(7.0376836292e-2)
    for c in _LOG:
        y = _fma(y, x, c)
    y = _fma(y * x, z, e * np.float32(-2.12194440e-4))
    y = _fma(z, np.float32(-0.5), y)
    return _fma(e, np.float32(0.693359375), x + y)


_LOG = (
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)


def _sincos(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cephes' sinf and cosf of angles from 0 on, likewise."""
    octant = (x * np.float32(1.27323954473516)).astype(np.int32) + 1 & ~1
    y = octant.astype(np.float32)
    for part in (-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8):
        x = _fma(y, np.float32(part), x)
    z = x * x
    cosine = _fma(
        _fma(np.float32(2.443315711809948e-5), z, -1.388731625493765e-3), z, 4.166664568298827e-2
    )
    cosine = _fma(cosine * z, z, z * np.float32(-0.5)) + np.float32(1)
    sine = _fma(_fma(np.float32(-1.9515295891e-4), z, 8.3321608736e-3), z, -1.6666654611e-1)
    sine = _fma(sine * z, x, x)
    swap = octant & 2 != 0
    sine, cosine = np.where(swap, cosine, sine), np.where(swap, sine, cosine)
    flip_sine, flip_cosine = octant & 4 != 0, (octant - 2) & 4 == 0
    return np.where(flip_sine, -sine, sine), np.where(flip_cosine, -cosine, cosine)


def _fma(a: _Float, b: _Float, c: _Float) -> np.ndarray:
    """The float32 nearest to a b + c.

    The product is exact in float64. Its sum with c is rounded to odd there, which a second rounding
    cannot falsify (Boldo and Melquiond 2008, IEEE TC 57(4)).
    """
    product = np.multiply(a, b, dtype=np.float64)
    term = np.asarray(c, np.float32).astype(np.float64)
    total = product + term
    high = total - product
    error = (product - (total - high)) + (term - high)
    even = total.view(np.int64) & 1 == 0
    odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where((error != 0) & even, odd, total).astype(np.float32)


def _seed(seed: int) -> int:
    if not 0 <= int(seed) < 2**64:
        raise InputError(f"a seed must be a whole number from 0 to 2**64 - 1, got {seed!r:.60}")
    return int(seed)
