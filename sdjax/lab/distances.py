"""How far two sets of samples are apart."""

import numpy as np
from jaxtyping import Float

from sdjax.errors import InputError

DIRECTIONS = 128


def sliced_wasserstein(
    a: Float[np.ndarray, "n ..."], b: Float[np.ndarray, "m ..."], directions: int = DIRECTIONS
) -> float:
    """The sliced Wasserstein distance of order 2 between two sets of equal size, of any shape.

    Bonneel et al. 2015 (Sliced and Radon Wasserstein Barycenters of Measures): the root of the mean
    over random directions of the squared distance between the sorted projections. In the samples'
    own units, per direction of unit length; the directions are always the same ones.

    Raises:
        InputError: the sets differ in size or shape.
    """
    if a.shape != b.shape or not len(a):
        raise InputError(f"two sets of equal size are compared, got {a.shape} and {b.shape}")
    a, b = (np.asarray(s, np.float64).reshape(len(s), -1) for s in (a, b))
    axes = np.random.default_rng(0).standard_normal((a.shape[1], directions))
    axes /= np.linalg.norm(axes, axis=0)
    across = np.sort(a @ axes, axis=0) - np.sort(b @ axes, axis=0)
    return float(np.sqrt(np.square(across).mean()))


def relative_error(found: Float[np.ndarray, "n ..."], right: Float[np.ndarray, "n ..."]) -> float:
    """Root mean square of the difference, as a share of the right answer's deviation."""
    found, right = (np.asarray(s, np.float64) for s in (found, right))
    spread = np.sqrt(np.square(right - right.mean(0)).mean())
    return float(np.sqrt(np.square(found - right).mean()) / spread)
