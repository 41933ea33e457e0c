"""Denoisers that are exact: what samplers are held against."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sdjax.types import Latents, Sigma, pytree


@pytree
class Gaussian:
    """E[x0 | x] when every value of x0 is N(mean, std^2): Karras et al. (2206.00364), appendix B.

    `mean` and `std` broadcast against x. A denoiser: `Gaussian(0.5, 2.0)(x, sigma)`.
    """

    mean: ArrayLike
    std: ArrayLike

    def __call__(self, x: Latents, sigma: Sigma) -> Latents:
        signal, noise = jnp.square(self.std), jnp.square(sigma)
        return jnp.asarray((self.mean * noise + x * signal) / (signal + noise))

    def flow(self, x: Latents, sigma: Sigma, sigma_next: Sigma) -> Latents:
        """Where the probability-flow ODE takes x from sigma to sigma_next, exactly."""
        signal = jnp.square(self.std)
        ratio = (signal + jnp.square(sigma_next)) / (signal + jnp.square(sigma))
        return jnp.asarray(self.mean + (x - self.mean) * jnp.sqrt(ratio))


@pytree
class GaussianMixture:
    """E[x0 | x] when x0 is one of k isotropic Gaussians, the whole image at once.

    `weights` [k] (sum 1), `means` [k, h, w, c] (or broadcastable to it), `stds` [k].
    """

    weights: ArrayLike
    means: ArrayLike
    stds: ArrayLike

    def __call__(self, x: Latents, sigma: Sigma) -> Latents:
        weights, means, stds = (
            jnp.asarray(self.weights),
            jnp.asarray(self.means),
            jnp.asarray(self.stds),
        )
        noise = jnp.square(jnp.broadcast_to(sigma, (x.shape[0], 1, 1, 1)))[:, None]
        signal = jnp.square(stds)[None, :, None, None, None]
        total = signal + noise  # [b, k, 1, 1, 1]
        away = x[:, None] - means[None]  # [b, k, h, w, c]
        axes = (2, 3, 4)
        values = x[0].size
        log = -0.5 * jnp.sum(jnp.square(away), axes) / total[..., 0, 0, 0]
        log = log - 0.5 * values * jnp.log(total[..., 0, 0, 0]) + jnp.log(weights)
        share = jax.nn.softmax(log, axis=1)[..., None, None, None]
        return jnp.sum(share * (means[None] + signal / total * away), axis=1)


@pytree
class Empirical:
    """E[x0 | x] when x0 is one of a data set's images, each as likely: the denoiser that a network
    with enough room would learn. Karras et al. (2206.00364), appendix B.3.

    `data` [n, h, w, c]. Its flow ends on one of them.
    """

    data: ArrayLike

    def __call__(self, x: Latents, sigma: Sigma) -> Latents:
        data = jnp.asarray(self.data)
        axes = (1, 2, 3)
        # One item at a time: expanding the square would cancel at low noise.
        away = jax.lax.map(lambda item: jnp.sum(jnp.square(x - item), axes), data)  # [n, b]
        level = jnp.broadcast_to(sigma, (x.shape[0], 1, 1, 1)).reshape(-1)
        share = jax.nn.softmax(-0.5 * away / jnp.square(level), axis=0)
        return jnp.einsum("nb,nhwc->bhwc", share, data, precision="highest")
