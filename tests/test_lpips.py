"""LPIPS against the same layers of torch, and its files."""

import first_stage_peers
import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest

from sdjax.checkpoints.lpips import load_lpips
from sdjax.errors import InputError
from sdjax.models.lpips import LPIPS, unit

WIDTHS = first_stage_peers.WIDTHS


def test_distances_and_gradients_agree_with_torch():
    import torch

    model = first_stage_peers.lpips()
    ours, params = LPIPS(WIDTHS), peers.flax_params(model)
    x, y = np.random.default_rng(0).uniform(-1, 1, (2, 3, 36, 32, 3)).astype(np.float32)

    def total(y, params):
        distances = ours.apply({"params": params}, x, y)
        return distances.sum(), distances

    (_, distances), grads = peers.quick_jit(jax.value_and_grad(total, has_aux=True))(y, params)
    there = peers.nchw(y).requires_grad_()
    theirs = model(peers.nchw(x), there)
    (by_y,) = torch.autograd.grad(theirs.sum(), there)
    assert peers.relative_error(distances, theirs.detach()) <= 1e-5
    assert peers.relative_error(grads, peers.nhwc(by_y)) <= 1e-4


def test_features_that_are_all_zero_have_no_gradient():
    value, grad = jax.value_and_grad(lambda x: unit(x).sum())(jnp.zeros((1, 2, 2, 3)))
    assert value == 0 and bool((grad == 0).all())


def test_parameters_have_the_packages_names_and_vgg16s_shapes():
    expected = LPIPS().shapes()
    theirs = first_stage_peers.lpips((64, 128, 256, 512, 512)).state_dict()
    assert expected == {key: tuple(value.shape) for key, value in theirs.items()}
    assert expected["net.slice5.28.weight"] == (512, 512, 3, 3) and len(expected) == 31


def files(tmp_path):
    """The package's state dict, and the same as torchvision's and lpips' two files."""
    state = first_stage_peers.lpips().state_dict()
    vgg = {
        "features." + key.split(".", 2)[2]: value
        for key, value in state.items()
        if key.startswith("net.")
    }
    lins = {key: value for key, value in state.items() if key.startswith("lin")}
    return state, vgg, lins


def test_weights_load_from_one_file_or_from_two(tmp_path):
    import torch
    from safetensors.torch import save_file

    state, vgg, lins = files(tmp_path)
    twice = {key.replace("lin", "lins.", 1): value for key, value in lins.items()}
    constants = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}
    torch.save(state | twice | constants, tmp_path / "lpips.pth")
    torch.save(lins, tmp_path / "vgg.pth")
    save_file(vgg | {"classifier.0.bias": torch.zeros(2)}, tmp_path / "vgg16.safetensors")
    one = load_lpips(tmp_path / "lpips.pth")
    two = load_lpips(tmp_path / "vgg.pth", tmp_path / "vgg16.safetensors")
    wanted = peers.flax_params(first_stage_peers.lpips())
    for module, params in (one, two):
        assert module == LPIPS(WIDTHS)
        assert jax.tree.structure(params) == jax.tree.structure(wanted)
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: (a == b).all(), params, wanted)))


def test_what_is_not_lpips_is_refused_in_one_sentence(tmp_path):
    import torch

    _, vgg, lins = files(tmp_path)

    def refused(*states):
        paths = [tmp_path / f"{i}.pth" for i in range(len(states))]
        for path, state in zip(paths, states, strict=True):
            torch.save(state, path)
        with pytest.raises(InputError) as error:
            load_lpips(*paths)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "lacks the linear weights of LPIPS: give lpips' vgg.pth too" in refused(vgg)
    assert "lacks the convolutions of VGG16: give torchvision's vgg16 too" in refused(lins)
    assert "'fc.weight', which belongs neither" in refused(vgg, {"fc.weight": torch.zeros(2, 2)})
    wrong = lins | {"lin1.model.1.weight": torch.zeros(1, 192, 1, 1)}
    assert "not alex.pth or squeeze.pth" in refused(vgg, wrong)
    less = {key: value for key, value in vgg.items() if key != "features.28.bias"}
    assert "net.slice5.28.bias" in refused(less, lins)
    with pytest.raises(InputError, match="needs files"):
        load_lpips()
