"""The VQ autoencoder against diffusers, and its codebook against formulas."""

import first_stage_peers
import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest

from sdjax.checkpoints.autoencoder import load_autoencoder, save_vae
from sdjax.errors import InputError
from sdjax.models import vq
from sdjax.models.fields import values
from sdjax.models.vae import AutoencoderKL
from sdjax.models.vq import VQModel
from sdjax.training.first_stage_loss import FirstStageLoss


def test_encoding_quantising_and_decoding_agree_with_diffusers():
    import torch

    model, config, params = first_stage_peers.vq_model()
    ours = VQModel.from_config(config)
    x = np.random.default_rng(0).uniform(-1, 1, (2, 20, 12, 3)).astype(np.float32)

    def apply(params, x):
        h = ours.apply({"params": params}, x, method="encode")
        found = ours.apply({"params": params}, h, method="lookup")
        return h, found, ours.apply({"params": params}, found.z, method="decode")

    h, found, decoded = peers.quick_jit(apply)(params, x)
    with torch.no_grad():
        there = model.encode(peers.nchw(x)).latents
        z, loss, (_, _, ids) = model.quantize(there)
        sample = model.decode(there).sample
    assert h.shape == (2, 10, 6, 3) and ours.factor == 2
    assert peers.relative_error(h, peers.nhwc(there)) <= 2e-5
    assert (np.asarray(found.ids).reshape(-1) == ids.numpy()).all() and len(set(ids.tolist())) > 2
    assert peers.relative_error(found.z, peers.nhwc(z)) <= 2e-5
    assert peers.relative_error(decoded, peers.nhwc(sample)) <= 2e-5
    total = FirstStageLoss().codebook(found.codebook_loss, found.commitment_loss)
    assert abs(float(total) / float(loss) - 1) <= 1e-5


def test_a_config_and_its_names_go_both_ways():
    model, config, _ = first_stage_peers.vq_model()
    ours = VQModel.from_config(config)
    assert VQModel.from_config(ours.config()) == ours and hash(ours) == hash(
        VQModel(**values(ours))
    )
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert ours.shapes() == expected
    theirs = type(model).from_config(ours.config()).config
    for key, value in config.items():
        if not key.startswith("_"):
            assert theirs[key] == value, key
    assert VQModel.from_config(config | {"vq_embed_dim": None}).vq_embed_dim == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm_type": "spatial"}, "'norm_type'"),
        ({"num_vq_embeddings": 0}, "got 0"),
        ({"lookup_from_codebook": 1}, "true or false"),
        ({"block_out_channels": [8, 9]}, "multiples of"),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_one_sentence(changes, words):
    config = first_stage_peers.SMALL | changes
    with pytest.raises(InputError) as error:
        VQModel.from_config(config)
    text = str(error.value)
    assert text.startswith("VQModel config: ") and words in text and "\n" not in text


@pytest.mark.parametrize("legacy", [True, False])
def test_straight_through_and_both_orders_of_beta_agree_with_diffusers(legacy):
    import torch
    from diffusers.models.autoencoders.vae import VectorQuantizer

    draw = np.random.default_rng(1)
    codebook = draw.standard_normal((20, 3), np.float32)
    h, towards = draw.standard_normal((2, 2, 5, 4, 3), np.float32)
    loss = FirstStageLoss(beta=0.25, legacy=legacy)

    def total(codebook, h):
        found = vq.quantize(codebook, h)
        value = loss.codebook(found.codebook_loss, found.commitment_loss)
        return 3.0 * value + (found.z * towards).sum(), value

    (_, value), grads = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(codebook, h)
    model = VectorQuantizer(20, 3, beta=0.25, legacy=legacy)
    model.embedding.weight.data = torch.from_numpy(codebook)
    there = peers.nchw(h).requires_grad_()
    z, theirs, _ = model(there)
    (3.0 * theirs + (z * peers.nchw(towards)).sum()).backward()
    assert abs(float(value) / theirs.item() - 1) <= 1e-5
    assert peers.relative_error(grads[0], model.embedding.weight.grad) <= 1e-4
    assert peers.relative_error(grads[1], peers.nhwc(there.grad)) <= 1e-4


def test_the_nearest_vector_is_the_nearest():
    draw = np.random.default_rng(2)
    codebook, h = draw.standard_normal((50, 4)), draw.standard_normal((30, 4))
    wanted = np.square(h[:, None] - codebook).sum(-1).argmin(1)
    found = vq.nearest(jnp.float32(codebook), jnp.float32(h))
    assert (np.asarray(found) == wanted).all()


def test_moving_averages_are_the_papers():
    """Equations 6 to 8 of appendix A.1, latent by latent, in float64."""
    draw = np.random.default_rng(3)
    codebook = draw.standard_normal((6, 2))
    averages = vq.start(jnp.float32(codebook))
    np.testing.assert_allclose(vq.learnt(averages), codebook, rtol=1e-6)
    sizes, sums = np.ones(6), codebook.copy()
    for _ in range(5):
        h = draw.standard_normal((2, 3, 4, 2))
        ids = np.asarray(vq.nearest(vq.learnt(averages), jnp.float32(h)))
        averages = vq.follow(averages, jnp.float32(h), ids, 0.9)
        for i in range(6):
            mine = h[ids == i]
            sizes[i] = 0.9 * sizes[i] + 0.1 * len(mine)
            sums[i] = 0.9 * sums[i] + 0.1 * mine.sum(0)
    smooth = (sizes + 1e-5) / (sizes.sum() + 6e-5) * sizes.sum()
    np.testing.assert_allclose(averages.sizes, sizes, rtol=1e-5)
    np.testing.assert_allclose(vq.learnt(averages), sums / smooth[:, None], rtol=1e-4)


def test_a_vector_that_nothing_is_near_stays_where_it_is():
    averages = vq.start(jnp.array([[0.0, 1.0], [9.0, 9.0]]))
    for _ in range(50):
        averages = vq.follow(averages, jnp.zeros((1, 1, 1, 2)), jnp.zeros((1, 1, 1), int), 0.9)
    codebook = np.asarray(vq.learnt(averages))
    np.testing.assert_allclose(codebook[0], [0, 0.9**50], rtol=1e-2)
    np.testing.assert_allclose(codebook[1], [9, 9], rtol=1e-2)


def test_a_saved_autoencoder_loads_here_and_in_diffusers(tmp_path):
    import diffusers

    model, config, params = first_stage_peers.vq_model()
    kl, kl_config = peers.tiny_vae("sd1", first_stage_peers.SMALL)
    for name, module, tree, theirs, convert in (
        ("vq", VQModel.from_config(config), params, model, first_stage_peers.vq_params),
        ("kl", AutoencoderKL.from_config(kl_config), peers.flax_params(kl), kl, peers.flax_params),
    ):
        path = save_vae(tmp_path / name, module, tree, 0.5)
        loaded, weights = load_autoencoder(path)
        assert loaded == module.clone(scaling_factor=0.5)
        there = getattr(diffusers, type(theirs).__name__).from_pretrained(path)
        assert there.config.scaling_factor == 0.5
        for other in (weights, convert(there)):
            assert jax.tree.structure(other) == jax.tree.structure(tree)
            assert all(jax.tree.leaves(jax.tree.map(lambda a, b: (a == b).all(), other, tree)))
        with pytest.raises(InputError, match="is there already"):
            save_vae(path, module, tree)
        save_vae(path, module, tree, dtype="float16", overwrite=True)
        assert jax.tree.leaves(load_autoencoder(path)[1])[0].dtype == jnp.float16
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kl", "vq"]
    with pytest.raises(InputError, match="lack 'vae/decoder"):
        save_vae(tmp_path / "x", VQModel.from_config(config), {"encoder": params["encoder"]})
    (path / "config.json").write_text('{"_class_name": "AsymmetricAutoencoderKL"}')
    with pytest.raises(InputError, match="'_class_name' must be"):
        load_autoencoder(path)
