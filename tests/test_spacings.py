"""Spacings against their formulas."""

import numpy as np
import pytest

from sdjax.diffusion import spacings
from sdjax.errors import InputError


def test_karras_is_even_in_the_rho_th_root():
    sigmas = spacings.karras(8, 0.03, 14.6)
    np.testing.assert_allclose([sigmas[0], sigmas[-2], sigmas[-1]], [14.6, 0.03, 0])
    np.testing.assert_allclose(np.diff(sigmas[:-1] ** (1 / 7), n=2), 0, atol=1e-12)


def test_exponential_is_even_in_the_logarithm():
    sigmas = spacings.exponential(8, 0.03, 14.6, final=0.01)
    np.testing.assert_allclose([sigmas[0], sigmas[-2], sigmas[-1]], [14.6, 0.03, 0.01])
    np.testing.assert_allclose(np.diff(np.log(sigmas[:-1]), n=2), 0, atol=1e-12)


def test_timestep_spacings_are_table_2_of_lin_et_al():
    np.testing.assert_array_equal(spacings.leading(4, offset=1), [751, 501, 251, 1])
    np.testing.assert_array_equal(spacings.trailing(4), [999, 749, 499, 249])
    np.testing.assert_array_equal(spacings.linspace(4), [999, 666, 333, 0])
    assert all(t.dtype == np.float64 for t in (spacings.leading(4), spacings.trailing(4)))


@pytest.mark.parametrize("name", ["leading", "trailing", "linspace"])
def test_every_step_count_gives_that_many_timesteps(name):
    for n in range(1, 1001):
        t = getattr(spacings, name)(n)
        assert len(t) == n and t.min() >= 0 and t.max() <= 999 and (np.diff(t) < 0).all()


def test_pad_repeats_the_last_value():
    out = spacings.pad([np.array([3.0, 1.0, 0.5]), np.array([2.0, 0.0])])
    assert out.shape == (3, 2, 1, 1, 1)
    np.testing.assert_array_equal(out[:, :, 0, 0, 0], [[3, 2], [1, 0], [0.5, 0]])
    assert spacings.pad([np.array([1.0, 0.0])], 5).shape == (5, 1, 1, 1, 1)


def test_bad_step_counts_are_refused():
    for n in (0, -3, True):
        with pytest.raises(InputError, match="steps"):
            spacings.karras(n, 0.1, 1.0)
    for spacing in (spacings.leading, spacings.trailing):
        with pytest.raises(InputError, match="1000"):
            spacing(1001)
    with pytest.raises(InputError, match="pad"):
        spacings.pad([])
    with pytest.raises(InputError, match="pad"):
        spacings.pad([np.ones(4)], 3)
