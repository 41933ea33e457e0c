"""Scaled dot-product attention for every network, by the fastest algorithm of the platform."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

_BLOCK = 1024
_KEYS = 4096
_PIECES = 16
_FEW_SCORES = 512 * 512
_FAST_BYTES = 32 * 2**20


def attention(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b t h d"],
    v: Float[Array, "b t h d"],
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Array, "b s h d"]:
    """Return softmax(scale * q kᵀ) v for every head.

    Vaswani et al. 2017 (arXiv 1706.03762), equation 1. `scale` is 1/sqrt(d) where it is None, and
    positive. With `causal`, query i sees keys 0..i. The softmax is float32; the result has q's
    dtype.

    The platform is that for which the program is compiled, not the default one. Scores that fit a
    cache are computed plainly; more of them by cuDNN's flash attention on a GPU (half precision),
    by `blocked` on a CPU and by `imagewise` on a TPU. Derivatives go through `blocked`, which
    keeps no scores.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.shape[1] * k.shape[1] < _FEW_SCORES:
        return plain(q, k, v, causal, scale)
    if _flash_fits(q, k):
        return _cuda_or_other(q, k, v, causal, scale)
    return _by_platform(q, k, v, causal, scale)


def plain(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b t h d"],
    v: Float[Array, "b t h d"],
    causal: bool,
    scale: float,
) -> Float[Array, "b s h d"]:
    """Compute all scores at once: [b, h, s, t] in float32."""
    scores = scale * jnp.einsum("bshd,bthd->bhst", q, k, preferred_element_type=jnp.float32)
    if causal:
        s, t = scores.shape[-2:]
        scores = jnp.where(jnp.arange(s)[:, None] >= jnp.arange(t), scores, -jnp.inf)
    weights = jax.nn.softmax(scores).astype(q.dtype)
    return jnp.einsum("bhst,bthd->bshd", weights, v)


def blocked(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b t h d"],
    v: Float[Array, "b t h d"],
    causal: bool,
    scale: float,
) -> Float[Array, "b s h d"]:
    """One head and at most 1024 queries at a time, keys in pieces, to keep the scores in a cache.

    The softmax is taken online (Milakov and Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022,
    arXiv 2205.14135): its sum is a column of ones beside v, its maximum rescales what was summed
    before. Differentiating computes a block anew instead of keeping its scores.
    """
    b, s, h, d = q.shape
    t = k.shape[1]
    blocks = -(-s // _BLOCK)
    rows = -(-s // blocks)
    piece = max(_KEYS, -(-t // _PIECES))
    queries = jnp.pad(_heads(q), ((0, 0), (0, blocks * rows - s), (0, 0)))
    queries = queries.reshape(b * h, blocks, rows, d)
    keys = _heads(k).swapaxes(1, 2)
    values = _heads(v)
    values = jnp.concatenate([values, jnp.ones((b * h, t, 1), v.dtype)], axis=-1)

    @jax.checkpoint
    def block(start: Int[Array, ""], query: Array, key: Array, value: Array) -> Float[Array, "n d"]:
        top = jnp.full((rows, 1), -jnp.inf)
        total = jnp.zeros((rows, d + 1))
        for left in range(0, t, piece):
            right = min(left + piece, t)
            scores = jnp.dot(query, key[:, left:right], preferred_element_type=jnp.float32)
            if causal:
                row = start + jnp.arange(rows)[:, None]
                scores = jnp.where(row >= jnp.arange(left, right), scores, -jnp.inf)
            last, top = top, jnp.maximum(top, lax.stop_gradient(scores.max(-1, keepdims=True)))
            weights = jnp.exp(scale * (scores - top)).astype(v.dtype)
            total = total * jnp.exp(scale * (last - top))
            total = total + jnp.dot(weights, value[left:right], preferred_element_type=jnp.float32)
        return (total[:, :d] / total[:, d:]).astype(q.dtype)

    def head(queries: Array, key: Array, value: Array) -> Array:
        starts = rows * jnp.arange(blocks)
        return lax.map(lambda one: block(one[0], one[1], key, value), (starts, queries))

    y = lax.map(lambda one: head(*one), (queries, keys, values))
    return y.reshape(b, h, -1, d)[:, :, :s].swapaxes(1, 2)


def imagewise(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b t h d"],
    v: Float[Array, "b t h d"],
    causal: bool,
    scale: float,
) -> Float[Array, "b s h d"]:
    """One image and so many queries at a time that their scores, [h, n, t], stay in a TPU's VMEM.

    The softmax's sum is a column of ones beside v. The result takes the place of the queries, so
    that no array has to be filled first or copied together after.
    """
    b, s, h, d = q.shape
    t = k.shape[1]
    most = max(128, _FAST_BYTES // (4 * h * t) // 128 * 128)
    rows = s if s <= most else next((n for n in range(most, 0, -128) if s % n == 0), most)
    blocks = -(-s // rows)
    queries = jnp.pad(q, ((0, 0), (0, blocks * rows - s), (0, 0), (0, 0)))

    def block(start: Int[Array, ""], query: Array, key: Array, value: Array) -> Array:
        scores = jnp.einsum("shd,thd->hst", query, key, preferred_element_type=jnp.float32)
        if causal:
            row = start + jnp.arange(rows)[:, None]
            scores = jnp.where(row >= jnp.arange(t), scores, -jnp.inf)
        weights = jnp.exp(scale * (scores - scores.max(-1, keepdims=True))).astype(v.dtype)
        total = jnp.einsum("hst,thd->hsd", weights, value, preferred_element_type=jnp.float32)
        return (total[..., :d] / total[..., d:]).astype(q.dtype).swapaxes(0, 1)

    def image(i: Array, y: Array) -> Array:
        key = lax.dynamic_index_in_dim(k, i, keepdims=False)
        value = lax.dynamic_index_in_dim(v, i, keepdims=False)
        value = jnp.concatenate([value, jnp.ones((t, h, 1), v.dtype)], axis=-1)

        def some(j: Array, y: Array) -> Array:
            query = lax.dynamic_slice(y, (i, rows * j, 0, 0), (1, rows, h, d))[0]
            done = block(rows * j, query, key, value)[None]
            return lax.dynamic_update_slice(y, done, (i, rows * j, 0, 0))

        return lax.fori_loop(0, blocks, some, y)

    return lax.fori_loop(0, b, image, queries)[:, :s]


def _heads(x: Float[Array, "b s h d"]) -> Float[Array, "bh s d"]:
    return x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _by_platform(q: Array, k: Array, v: Array, causal: bool, scale: float) -> Array:
    return lax.platform_dependent(
        q,
        k,
        v,
        cpu=functools.partial(blocked, causal=causal, scale=scale),
        tpu=functools.partial(imagewise, causal=causal, scale=scale),
        default=functools.partial(plain, causal=causal, scale=scale),
    )


@_by_platform.defjvp
def _by_platform_jvp(causal: bool, scale: float, primals: tuple, tangents: tuple) -> tuple:
    f = functools.partial(blocked, causal=causal, scale=scale)
    return jax.jvp(f, primals, tangents)


def _flash_fits(q: Array, k: Array) -> bool:
    """Whether this process has a GPU and cuDNN a kernel for these arrays and their gradients.

    jax 0.10 refuses to differentiate cuDNN's attention over an odd number of tokens, such as 77.
    """
    half = q.dtype in (jnp.float16, jnp.bfloat16) and k.dtype == q.dtype
    even = q.shape[1] % 2 == k.shape[1] % 2 == 0
    width = q.shape[-1]
    return half and even and width % 8 == 0 and width <= 128 and jax.default_backend() == "gpu"


def _cuda_or_other(q: Array, k: Array, v: Array, causal: bool, scale: float) -> Array:
    def flash(q: Array, k: Array, v: Array) -> Array:
        return jax.nn.dot_product_attention(
            q, k, v, scale=scale, is_causal=causal, implementation="cudnn"
        )

    def other(q: Array, k: Array, v: Array) -> Array:
        return _by_platform(q, k, v, causal, scale)

    return lax.platform_dependent(q, k, v, cuda=flash, default=other)
