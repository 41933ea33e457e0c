"""Training the autoencoder, against torch on equal weights and noise."""

import dataclasses
import functools
import re

import first_stage_peers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
import pytest
from first_stage_peers import distance, raveled, unraveled
from jax.ad_checkpoint import print_saved_residuals

from sdjax.errors import InputError
from sdjax.models import vq
from sdjax.models.discriminator import Discriminator
from sdjax.models.lpips import LPIPS
from sdjax.models.vae import AutoencoderKL
from sdjax.models.vq import VQModel
from sdjax.training import first_stage
from sdjax.training.first_stage import FirstStage, FirstStageLoss

LOSS, NORM = 1e-5, 1e-4
FLAT = first_stage_peers.SMALL | {
    "block_out_channels": [8],
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "mid_block_add_attention": False,
}
LR, BETAS, EPSILON, DECAY = 1e-4, (0.5, 0.9), 1e-8, 1e-2


def images(count=2, seed=0):
    """A batch and its keys."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), np.uint8)
    return {"pixels": pixels}, jax.random.split(jax.random.key(seed + 5), count)


@functools.cache
def compiled(stage, what=""):
    """The stage's gradients of two images, as a program; another one for another `what`."""
    call = jax.jit(lambda *a: stage.gradients(*a))
    programs = {}

    def run(params, extra, frozen, at, batch=None):
        batch, keys = batch or images()
        args = (params, extra, frozen, batch, keys, jnp.int32(at))
        if not programs:
            programs[0] = call.lower(*args).compile(compiler_options=peers.QUICK)
        return programs[0](*args)

    return run


@functools.cache
def kl():
    """Everything at once: KL, LPIPS, hinge, logvar. Returns stage, params, frozen."""
    model, config = peers.tiny_vae("sd1", FLAT)
    loss = FirstStageLoss(
        kl_weight=1e-2,
        perceptual_weight=0.7,
        disc_start=5,
        disc_weight=0.1,
        learn_logvar=True,
        logvar_init=-0.3,
    )
    stage = FirstStage(
        AutoencoderKL.from_config(config),
        Discriminator(8, 1),
        LPIPS(first_stage_peers.WIDTHS),
        loss,
    )
    params = {
        "vae": peers.flax_params(model),
        "discriminator": peers.flax_params(first_stage_peers.discriminator()),
        "logvar": np.float32(-0.3),
    }
    return stage, params, {"lpips": peers.flax_params(first_stage_peers.lpips())}


@functools.cache
def bare():
    """KL and nothing else, on an autoencoder of one level."""
    model, config = peers.tiny_vae("sd1", FLAT)
    stage = FirstStage(AutoencoderKL.from_config(config))
    return stage, {"vae": peers.flax_params(model)}


@functools.cache
def with_codebook():
    """A codebook, the logistic loss, squared differences. Returns stage and params."""
    _, config, params = first_stage_peers.vq_model()
    loss = FirstStageLoss(pixel_loss="l2", disc_loss="vanilla", disc_start=0, disc_weight=0.6)
    stage = FirstStage(VQModel.from_config(config), Discriminator(8, 1, "none"), loss=loss)
    disc = first_stage_peers.discriminator(norm="none")
    return stage, {"vae": params, "discriminator": peers.flax_params(disc)}


class Reference:
    """CompVis's losses and gradients, written with torch from their definitions."""

    def __init__(self, loss, vae, disc, lpips=None, logvar=None):
        self.loss, self.vae, self.disc, self.lpips, self.logvar = (
            loss,
            vae,
            disc.train(),
            lpips,
            logvar,
        )

    def forward(self, batch, keys):
        """Pixels, reconstructions, regulariser and its metric's name."""
        x = peers.nchw(batch["pixels"].astype(np.float32) / 127.5 - 1)
        if type(self.vae).__name__ == "VQModel":
            out = self.vae.decode(self.vae.encode(x).latents)
            return x, out.sample, out.commit_loss.mean(), "codebook"
        posterior = self.vae.encode(x).latent_dist
        _, c, h, w = posterior.mean.shape
        noise = peers.nchw(first_stage.latent_noise(keys, (h, w, c)))
        z = posterior.mean + posterior.std * noise
        return x, self.vae.decode(z).sample, posterior.kl().mean(), "kl"

    def metrics(self, batch, keys):
        """All of them; leaves the gradients in the networks."""
        import torch
        from torch.nn.functional import relu, softplus

        x, y, regular, name = self.forward(batch, keys)
        values = {name: regular, "rec": (x - y).abs().mean()}
        each = (x - y).abs() if self.loss.pixel_loss == "l1" else (x - y).square()
        if self.lpips is not None:
            values["perceptual"] = self.lpips(x, y)
            each = each + self.loss.perceptual_weight * values["perceptual"][:, None, None, None]
            values["perceptual"] = values["perceptual"].mean()
        if name == "kl":
            each = each / self.logvar.exp() + self.logvar
            nll, regular = each.sum() / len(x), self.loss.kl_weight * regular
        else:
            nll, regular = each.mean(), self.loss.codebook_weight * regular
        last = self.vae.decoder.conv_out.weight
        g_loss = -self.disc(y).mean()
        up, down = (torch.autograd.grad(v, last, retain_graph=True)[0] for v in (nll, g_loss))
        weight = (up.norm() / (down.norm() + 1e-4)).clamp(0, 1e4) * self.loss.disc_weight
        loss = nll + regular + weight * g_loss
        loss.backward()
        self.disc.zero_grad()
        real, fake = self.disc(x), self.disc(y.detach())
        if self.loss.disc_loss == "hinge":
            disc_loss = 0.5 * (relu(1 - real).mean() + relu(1 + fake).mean())
        else:
            disc_loss = 0.5 * (softplus(-real).mean() + softplus(fake).mean())
        disc_loss.backward()
        mse = (x - y.clamp(-1, 1)).square().mean((1, 2, 3))
        values |= {"nll": nll, "loss": loss, "g_loss": g_loss, "d_weight": weight}
        values |= {"psnr": 10 * (4 / mse).log10().mean(), "disc_loss": disc_loss}
        values |= {"logits_real": real.mean(), "logits_fake": fake.mean()}
        return {key: value.item() for key, value in values.items()}


def reference(which):
    """The torch side of `kl` or `with_codebook`, and how its names become ours."""
    import torch

    if which is kl:
        vae = peers.tiny_vae("sd1", FLAT)[0]
        logvar = torch.tensor(-0.3, requires_grad=True)
        parts = first_stage_peers.discriminator(), first_stage_peers.lpips(), logvar
        return Reference(kl()[0].loss, vae, *parts), peers.flax_params
    vae = first_stage_peers.vq_model()[0]
    disc = first_stage_peers.discriminator(norm="none")
    return Reference(with_codebook()[0].loss, vae, disc), first_stage_peers.vq_params


def without_key_biases(tree):
    """The softmax does not see them: their gradients are rounding, of which AdamW makes steps."""
    if not isinstance(tree, dict):
        return tree
    kept = {key: without_key_biases(value) for key, value in tree.items()}
    if "to_k" in kept:
        del kept["to_k"]["bias"]
    return kept


@pytest.mark.parametrize("which", [kl, with_codebook])
def test_losses_gradients_and_three_steps_of_adamw_agree_with_torch(which):
    import torch

    stage, params, *frozen = which()
    theirs, convert = reference(which)
    networks = {"vae": (theirs.vae, convert), "discriminator": (theirs.disc, peers.flax_params)}
    leaves = [*theirs.vae.parameters(), *theirs.disc.parameters()]
    leaves += [] if theirs.logvar is None else [theirs.logvar]
    adamw = torch.optim.AdamW(leaves, LR, BETAS, EPSILON, DECAY)
    ours = optax.adamw(LR, *BETAS, EPSILON, weight_decay=DECAY)
    update, begun = peers.quick_jit(ours.update), params
    flat = raveled(params)
    moments = ours.init(flat)
    for at in range(3):
        batch = images(seed=at)
        found = compiled(stage)(params, (), *(frozen or [{}]), 5 + at, batch)
        wanted = theirs.metrics(*batch)
        assert set(found.metrics) - {"perplexity"} == set(wanted)
        for name, value in wanted.items():
            limit = NORM if name == "d_weight" else LOSS
            assert abs(float(found.metrics[name]) / value - 1) <= limit, (at, name)
        for name, (network, rule) in networks.items():
            error = distance(found.grads[name], first_stage_peers.gradients(network, rule))
            assert error <= NORM, (at, name, error)
        if theirs.logvar is not None:
            assert abs(float(found.grads["logvar"]) / theirs.logvar.grad.item() - 1) <= NORM
        updates, moments = update(raveled(found.grads), moments, flat)
        flat = flat + np.asarray(updates)
        params = unraveled(flat, params)
        adamw.step()
        adamw.zero_grad()
    for name, (network, rule) in networks.items():
        here, there, start = map(without_key_biases, (params[name], rule(network), begun[name]))
        assert distance(here, there) <= 1e-5, name
        moves = [jax.tree.map(np.subtract, end, start) for end in (here, there)]
        assert distance(*moves) <= 1e-3, name
    if theirs.logvar is not None:
        assert abs(params["logvar"] / theirs.logvar.item() - 1) <= 1e-5


def test_before_its_start_the_discriminator_is_neither_trained_nor_heard():
    stage, params, frozen = kl()
    before, after = (compiled(stage)(params, (), frozen, at) for at in (4, 5))
    names = ("g_loss", "d_weight", "disc_loss", "logits_real", "logits_fake")
    assert all(before.metrics[name] == 0 != after.metrics[name] for name in names)
    assert not any(leaf.any() for leaf in jax.tree.leaves(before.grads["discriminator"]))
    assert before.metrics["nll"] == after.metrics["nll"]
    regular = 1e-2 * before.metrics["kl"]
    np.testing.assert_allclose(before.metrics["loss"], before.metrics["nll"] + regular, rtol=1e-6)
    assert distance(before.grads["vae"], after.grads["vae"]) > 0.01


def test_an_image_s_share_does_not_depend_on_the_others():
    stage, params, frozen = kl()
    batch, keys = images()

    def run(*which):
        which = np.array(which)
        part = {"pixels": batch["pixels"][which]}, keys[which]
        return compiled(stage)(params, (), frozen, 0, part)

    both, swapped, first, second = run(0, 1), run(1, 0), run(0, 0), run(1, 1)
    halves = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    for other in (swapped, halves):
        assert distance(other.grads, both.grads) < 1e-5
        assert distance(other.metrics, both.metrics) < 1e-5


def test_bfloat16_recomputing_and_the_mean_change_little_but_the_scale():
    stage, params = bare()
    loss = FirstStageLoss(reduction="mean", kl_weight=1e-2)
    half = dataclasses.replace(stage, dtype="bfloat16", remat=True, loss=loss)
    found = compiled(half)(params, (), {}, 0)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found))
    theirs = Reference(loss, peers.tiny_vae("sd1", FLAT)[0], first_stage_peers.discriminator())
    x, y, divergence, _ = theirs.forward(*images())
    wanted = (x - y).abs().mean() + 1e-2 * divergence / x[0].numel()
    wanted.backward()
    assert abs(float(found.metrics["loss"]) / wanted.item() - 1) < 0.01
    error = distance(found.grads["vae"], first_stage_peers.gradients(theirs.vae))
    assert 1e-4 < error < 0.1


def test_recomputing_keeps_less_than_half(capsys):
    stage, params = bare()
    batch, keys = images()
    pixels = first_stage.to_float(batch["pixels"])

    def kept(remat):
        made = dataclasses.replace(stage, remat=remat)
        forward = lambda vae: made._forward(vae, {}, (), pixels, keys)[0]  # noqa: E731
        print_saved_residuals(forward, params["vae"])
        lines = capsys.readouterr().out.splitlines()
        shapes = [re.match(r"\w+\[([\d,]+)\]", line) for line in lines if "argument" not in line]
        return sum(np.prod([int(n) for n in s[1].split(",")]) for s in shapes if s)

    assert 0 < kept(True) < kept(False) / 2


def test_a_decoder_alone_gets_the_gradients_that_it_gets_with_its_encoder():
    stage, params, frozen = kl()
    whole = compiled(stage)(params, (), frozen, 0)
    trained, kept = first_stage.split(params["vae"])
    assert set(kept) == {"encoder", "quant_conv"}
    alone = compiled(stage, "alone")(params | {"vae": trained}, (), frozen | {"vae": kept}, 0)
    assert set(alone.grads["vae"]) == {"decoder", "post_quant_conv"}
    assert distance(alone.grads["vae"], {n: whole.grads["vae"][n] for n in trained}) < 1e-5
    np.testing.assert_allclose(alone.metrics["loss"], whole.metrics["loss"], rtol=1e-6)


def test_an_ema_codebook_follows_the_latents_and_the_params_own_is_not_used():
    import torch

    model, config, params = first_stage_peers.vq_model(FLAT)
    loss = FirstStageLoss(ema_decay=0.9, codebook_weight=2.0, beta=0.5)
    stage = FirstStage(VQModel.from_config(config), loss=loss)
    table = params["quantize"]["embedding"]["embedding"]
    extra = stage.first_extra({"vae": params})
    np.testing.assert_allclose(vq.learnt(extra), table, rtol=1e-6)
    extra, table = extra._replace(sums=extra.sums + 0.1), table + 0.1
    params["quantize"]["embedding"]["embedding"] = np.full_like(table, np.nan)
    saved = stage.autoencoder({"vae": params}, extra)
    np.testing.assert_allclose(saved["quantize"]["embedding"]["embedding"], table, rtol=1e-5)
    batch, keys = images()
    (made, regular), (_, after, metrics) = peers.quick_jit(stage._forward)(
        params, {}, extra, first_stage.to_float(batch["pixels"]), keys
    )
    with torch.no_grad():
        h = peers.nhwc(model.encode(peers.nchw(batch["pixels"] / np.float32(127.5) - 1)).latents)
    ids = np.asarray(vq.nearest(table, h))
    assert np.isfinite(made).all()
    assert distance(after._asdict(), vq.follow(extra, h, ids, 0.9)._asdict()) < 1e-5
    commitment = np.square(h - table[ids]).mean()
    np.testing.assert_allclose(metrics["codebook"], 0.5 * commitment, rtol=1e-4)
    np.testing.assert_allclose(regular, 2.0 * metrics["codebook"], rtol=1e-6)
    share = np.bincount(ids.ravel()) / ids.size
    perplexity = np.exp(-sum(p * np.log(p) for p in share if p))
    np.testing.assert_allclose(metrics["perplexity"], perplexity, rtol=1e-4)


@pytest.mark.parametrize("which", [kl, with_codebook])
def test_params_are_drawn_for_every_network_that_is_trained(which):
    stage, params, *_ = which()
    drawn, extra = jax.eval_shape(stage.init, jax.random.key(0))
    assert extra == () and hash(stage) == hash(dataclasses.replace(stage))
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, params)


def test_scale_makes_latents_of_unit_deviation():
    import torch

    stage, params = bare()
    batches = [images(3, seed)[0] for seed in range(4)]
    scale = first_stage.measure_scale(stage, params, batches)
    pixels = np.concatenate([batch["pixels"] for batch in batches])
    with torch.no_grad():
        there = peers.tiny_vae("sd1", FLAT)[0].encode(peers.nchw(pixels / np.float32(127.5) - 1))
    deviation = (there.latent_dist.mean.var() + there.latent_dist.var.mean()).sqrt().item()
    assert abs(scale * deviation - 1) < 0.03
    with pytest.raises(InputError, match="there are none"):
        first_stage.measure_scale(stage, params, [])


def test_what_does_not_exist_is_refused_in_one_sentence():
    with pytest.raises(InputError, match="disc_loss must be 'hinge' or 'vanilla', got 'wgan'"):
        FirstStageLoss(disc_loss="wgan")
    with pytest.raises(InputError, match="ema_decay must be"):
        FirstStageLoss(ema_decay=1.0)
    stage = FirstStage(with_codebook()[0].vae, Discriminator(), LPIPS())
    with pytest.raises(InputError, match="width must be a multiple of 2, got 33: try 32"):
        stage.check(32, 33)
    with pytest.raises(
        InputError, match="height must be at least 24 for the discriminator, got 16"
    ):
        stage.check(16, 32)
    with pytest.raises(InputError, match="norm must be one of batch, group, none, got 'layer'"):
        jax.eval_shape(
            Discriminator(norm="layer").init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))
        )
