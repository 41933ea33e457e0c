"""Two-dimensional convolution by the fastest algorithm of the platform: NHWC, HWIO."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Pads = tuple[tuple[int, int], tuple[int, int]]
_LAYOUT = ("NHWC", "HWIO", "NHWC")

# Winograd's F(2x2, 3x3): Y = Aᵀ [(G g Gᵀ) * (Bᵀ d B)] A, rows as coefficients.
_B = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_G = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
_A = ((1, 1, 1, 0), (0, 1, -1, -1))

# Which of a 3x3 kernel's rows meet the two source pixels that an even, an odd doubled row sees.
_HALVES = (((1, 0, 0), (0, 1, 1)), ((1, 1, 0), (0, 0, 1)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def conv2d(
    x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw c k"], stride: int, pads: Pads
) -> Float[Array, "b H W k"]:
    """Convolve x with the kernel; `pads` is ((top, bottom), (left, right)).

    Derivatives of every order and mode are those of `lax.conv_general_dilated`.
    """
    return lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_cpu, stride=stride, pads=pads),
        default=functools.partial(direct, stride=stride, pads=pads),
    )


@conv2d.defjvp
def _conv2d_jvp(stride: int, pads: Pads, primals: tuple, tangents: tuple) -> tuple:
    (x, kernel), (dx, dkernel) = primals, tangents
    tangent = direct(dx, kernel, stride, pads) + direct(x, dkernel, stride, pads)
    return conv2d(x, kernel, stride, pads), tangent


def direct(
    x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw c k"], stride: int, pads: Pads
) -> Float[Array, "b H W k"]:
    """Convolve by XLA's own algorithm."""
    strides = (stride, stride)
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=_LAYOUT)


def _cpu(
    x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw c k"], stride: int, pads: Pads
) -> Float[Array, "b H W k"]:
    """Choose by an image's shape; the thresholds were measured at SD1.5's (benchmarks/README.md).

    XLA (jaxlib 0.10) takes YNNPACK for products and for convolutions whose output is not larger
    than their input, Eigen else. Eigen's convolutions are often faster, and nothing here takes
    them: of programs that run at the same time, on several CPU devices or from several threads,
    the first image was wrong. Some gradients still do, where it was not seen.
    """
    _, h, w, c = x.shape
    same3x3 = kernel.shape[:2] == (3, 3) and stride == 1 and pads == ((1, 1), (1, 1))
    if same3x3 and x.dtype == jnp.float32 and min(c, kernel.shape[3]) >= 128:
        if h * w < 256:
            return patched(x, kernel, pads)
        if h % 2 == w % 2 == 0:
            return winograd(x, kernel)
    return direct(x, kernel, stride, pads)


def patched(
    x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw c k"], pads: Pads
) -> Float[Array, "b H W k"]:
    """Convolve as one product with each window's pixels side by side, for few pixels."""
    rows, columns, c, k = kernel.shape
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    b, h, w = padded.shape[0], padded.shape[1] - rows + 1, padded.shape[2] - columns + 1
    taps = [padded[:, i : i + h, j : j + w] for i in range(rows) for j in range(columns)]
    windows = jnp.concatenate(taps, -1).reshape(b * h * w, rows * columns * c)
    return jnp.dot(windows, kernel.reshape(-1, k)).reshape(b, h, w, k)


def winograd(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c k"]
) -> Float[Array, "b h w k"]:
    """A 3x3 convolution with padding 1 in 16 multiplications where the direct one takes 36.

    Lavin and Gray 2016 (arXiv 1509.09308), F(2x2, 3x3), whose float32 error is the direct sum's.
    Height and width are even. The 16 products stay 16 arrays: XLA's CPU backend is slow at
    stacking them.
    """
    b, h, w, c = x.shape
    tiles = (b, h // 2, w // 2)
    filters = _sandwich(_G, [[kernel[i, j] for j in range(3)] for i in range(3)])
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    padded = padded.reshape(b, h // 2 + 1, 2, w // 2 + 1, 2, c)

    def tap(i: int, j: int) -> Float[Array, "b th tw c"]:
        row, column = i // 2, j // 2
        return padded[:, row : row + h // 2, i % 2, column : column + w // 2, j % 2]

    windows = _sandwich(_B, [[tap(i, j) for j in range(4)] for i in range(4)])
    products = [
        [jnp.dot(windows[i][j].reshape(-1, c), filters[i][j]).reshape(*tiles, -1) for j in range(4)]
        for i in range(4)
    ]
    y = _sandwich(_A, products)
    rows = [jnp.stack(row, axis=3) for row in y]
    return jnp.stack(rows, axis=2).reshape(b, h, w, -1)


def doubled_conv2d(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c k"]
) -> Float[Array, "b h2 w2 k"]:
    """`conv2d(upsample_nearest(x), kernel, 1, ((1, 1), (1, 1)))`, on a CPU without doubling x.

    Under nearest doubling a 3x3 window sees but 2x2 different pixels. Rows of the kernel that meet
    the same pixel are added, one 2x2 kernel for each parity of row and column: 16 products where
    the plain form has 36, and a quarter of the reading. For few pixels that adding takes longest.
    """
    cpu = _by_parity if x.shape[1] * x.shape[2] >= 1024 else _doubled_first
    return lax.platform_dependent(x, kernel, cpu=cpu, default=_doubled_first)


def upsample_nearest(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Double height and width by repeating pixels."""
    b, h, w, c = x.shape
    y = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
    return y.reshape(b, 2 * h, 2 * w, c)


def _doubled_first(x: Array, kernel: Array) -> Array:
    return conv2d(upsample_nearest(x), kernel, 1, ((1, 1), (1, 1)))


def _by_parity(x: Array, kernel: Array) -> Array:
    (b, h, w, c), k = x.shape, kernel.shape[3]
    halves = jnp.asarray(_HALVES, kernel.dtype)
    small = jnp.einsum("pai,qbj,ijck->abcpqk", halves, halves, kernel).reshape(2, 2, c, 4 * k)
    # [b, h + 1, w + 1, ...]: row i is the even one of pixel i and the odd one of pixel i - 1.
    y = _two_by_two(x, small).reshape(b, h + 1, w + 1, 2, 2, k)
    rows = [jnp.stack([y[:, p : p + h, q : q + w, p, q] for q in (0, 1)], 3) for p in (0, 1)]
    return jnp.stack(rows, 2).reshape(b, 2 * h, 2 * w, k)


@jax.custom_jvp
def _two_by_two(x: Array, kernel: Array) -> Array:
    """A 2x2 convolution with padding 1; its derivatives are products, where XLA's own are slow."""
    return patched(x, kernel, ((1, 1), (1, 1)))


@_two_by_two.defjvp
def _two_by_two_jvp(primals: tuple, tangents: tuple) -> tuple:
    (x, kernel), (dx, dkernel) = primals, tangents
    return _two_by_two(x, kernel), _four_products(dx, kernel) + _four_products(x, dkernel)


def _four_products(x: Array, kernel: Array) -> Array:
    _, h, w, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))

    def tap(i: int, j: int) -> Array:
        return jnp.dot(padded[:, i : i + h + 1, j : j + w + 1], kernel[i, j])

    return tap(0, 0) + tap(0, 1) + tap(1, 0) + tap(1, 1)


def _sandwich(matrix: tuple, grid: list[list[Array]]) -> list[list[Array]]:
    """Return matrix · grid · matrixᵀ, the grid's entries being arrays."""
    half = [_combine(matrix, list(column)) for column in zip(*grid, strict=True)]
    return [_combine(matrix, list(row)) for row in zip(*half, strict=True)]


def _combine(matrix: tuple, arrays: list[Array]) -> list[Array]:
    """Return matrix · arrays, leaving out what is multiplied by 0."""
    sums = []
    for row in matrix:
        terms = [a if c == 1 else c * a for c, a in zip(row, arrays, strict=True) if c != 0]
        sums.append(functools.reduce(jnp.add, terms))
    return sums
