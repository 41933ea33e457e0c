"""What a training run can be told: every table, key, kind, range and default."""

from dataclasses import dataclass

from sdjax.diffusion.names import SAMPLERS
from sdjax.training.tables import REQUIRED, choice, flag, number, side, text, texts, whole

KINDS = ("first_stage", "second_stage", "scenes_text", "scenes_measure")
NETWORKS = ("unet", "text_encoder", "text_encoder_2", "vae", "decoder")
DISTANCES = ("l2", "l1", "huber")
TIMESTEPS = ("uniform", "cubic", "logit_normal")
"""As in training.losses, which a test holds them against: refusing should not wait for jax."""

FIRST, SECOND = "first_stage", "second_stage"


@dataclass(frozen=True, kw_only=True)
class Steps:
    """[run]: how long, how much at once, and what is written when."""

    out: str = text()
    """The run's folder: checkpoints, metrics, samples, and the model in the end. Left out in a
    file, it is runs/ and the file's name."""
    steps: int = whole(low=1)
    """Optimizer steps."""
    batch_size: int = whole(low=1)
    """Images an optimizer step, over all devices and hosts."""
    accumulate: int = whole(1, low=1)
    """Parts that a batch is taken in, one after the other: memory for time."""
    seed: int = whole(0, high=2**32 - 1)
    """Of weights, noise and whatever else is drawn while training."""
    log_every: int = whole(20, low=1)
    """Steps from one line of metrics to the next."""
    sample_every: int = whole(1000)
    """Steps from one grid of samples to the next; 0 is never."""
    save_every: int = whole(500, low=1)
    """Steps from one checkpoint to the next; the last step is always saved."""
    keep: int = whole(2, low=1)
    """How many checkpoints stay, the newest."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """[model]: what is trained, and what it starts from."""

    config: str | None = text(None)
    """A shipped config's name or a .toml file: fresh random weights."""
    load: str | None = text(None)
    """A checkpoint to go on from, whatever `sdjax.load` takes. It, or `config`."""
    vae: str | None = text(None, only=SECOND)
    """A trained first stage; left out, the one that `load` brings."""
    train: tuple[str, ...] = texts((), NETWORKS)
    """Networks that learn. Left out: the UNet in a second stage, the VAE in a first, where decoder
    alone leaves a loaded VAE's latents as they are, for the UNets that know them."""
    dtype: str = choice("float32", ("float32", "bfloat16"))
    """What networks compute in; weights, norms' statistics and losses are always float32."""
    remat: bool = flag(False)
    """Whether activations are computed again for the gradient: a third more time, far less memory.
    """


@dataclass(frozen=True, kw_only=True)
class Data:
    """[data]: images and captions."""

    source: tuple[str, ...] = texts()
    """`scenes`, a folder with metadata.jsonl, or tars as a pattern or a list."""
    height: int = side()
    """Pixels, a multiple of 8."""
    width: int = side()
    """Pixels, a multiple of 8."""
    caption_column: str = text("text")
    """The caption's name in metadata.jsonl."""
    flip: bool = flag(False)
    """Whether every other image is mirrored, by chance."""
    crop: str = choice("center", ("center", "random"))
    """What is kept of an image of another shape."""
    workers: int = whole(0, high=1024)
    """Processes that read and decode; 0 does it in this one."""
    seed: int = whole(0, high=2**32 - 1)
    """Of the order, the crops, the flips, and of the world of `scenes`."""
    cache: str | None = text(None, only=SECOND)
    """A folder for latents, and for text states if no text encoder learns; left out, both are
    computed at every step."""
    count: int | None = whole(None, low=1)
    """How many examples of `scenes`, which is endless, make an epoch; left out, none repeats."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """[optimizer]: AdamW (1711.05101) or Muon after warm-up, and clipping by the global norm."""

    name: str = choice("adamw", ("adamw", "muon"))
    """Muon (2502.16982) makes the steps of hidden layers' kernels orthogonal, and as large as
    AdamW's, so that rates carry over; vectors, embeddings and outermost convolutions keep AdamW."""
    learning_rate: float = number(1e-4, over=True)
    """At its peak."""
    warmup: int = whole(0)
    """Steps over which it rises in a straight line: the first has 1 / warmup of the peak."""
    schedule: str = choice("constant", ("constant", "cosine"))
    """After the warm-up: as it is, or down half a cosine to the last step (1608.03983)."""
    final: float = number(0.0, high=1.0)
    """Share of the peak that the cosine ends at."""
    beta1: float = number(0.9, high=1.0, under=True)
    beta2: float = number(0.999, high=1.0, under=True)
    epsilon: float = number(1e-8, over=True)
    weight_decay: float = number(1e-2)
    """Times the learning rate, off every weight at every step."""
    clip: float = number(1.0)
    """The gradients' largest global norm; 0 is off."""
    discriminator_learning_rate: float | None = number(None, over=True, only=FIRST)
    """Left out, it is the learning rate."""


@dataclass(frozen=True, kw_only=True)
class Ema:
    """[ema]: the moving average of the weights that is saved beside them."""

    decay: float = number(0.9999, high=1.0, under=True)
    """Share of the old average that a step keeps; 0 is off."""
    warmup: bool = flag(True)
    """Whether decay is at most (1 + step) / (10 + step), so that a short run forgets its start."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """[loss]: what is made small. The first keys are the second stage's, the others the first's."""

    kind: str = choice("l2", DISTANCES, only=SECOND)
    huber_scale: float = number(0.1, over=True, only=SECOND)
    """Where huber turns from square to straight."""
    timesteps: str = choice("uniform", TIMESTEPS, only=SECOND)
    """How noise levels are drawn: cubic has more of the noisy ones, logit_normal of the middle."""
    perturbation: float = number(0.0, high=1.0, only=SECOND)
    """Noise on the network's input alone (2301.11706, 0.1 there); 0 is off."""
    min_snr_gamma: float | None = number(None, over=True, only=SECOND)
    """Where min-SNR weighting caps the SNR (2303.09556), 5 in the paper; left out, it is off. Where
    no signal is left (zero_snr) the weight is 1, for the formula's is 0 or undefined there."""
    offset_noise: float = number(0.0, high=1.0, only=SECOND)
    """Noise added that is constant over a channel, relative to the rest; 0 is off."""
    caption_dropout: float = number(0.1, high=1.0, only=SECOND)
    """Share of captions replaced by the empty one, for guidance (2207.12598)."""
    prediction: str | None = choice(None, ("epsilon", "v_prediction", "sample"), only=SECOND)
    """What the network says; left out, as the model's scheduler has it."""
    zero_snr: bool | None = flag(None, only=SECOND)
    """Whether the last noise level is all noise (2305.08891); left out, as the model has it."""
    pixel: str = choice("l1", ("l1", "l2"), only=FIRST)
    reduction: str | None = choice(None, ("sum", "mean"), only=FIRST)
    """Over an image's values; left out, as in latent-diffusion: sum with a KL, mean with codebook,
    which the weights of the other terms are made for."""
    learn_logvar: bool = flag(False, only=FIRST)
    """Whether the scale of the likelihood is learnt."""
    kl_weight: float = number(1e-6, only=FIRST)
    codebook_weight: float = number(1.0, only=FIRST)
    codebook_beta: float = number(0.25, only=FIRST)
    """Of the smaller of a codebook's two terms: which one that is, `codebook_legacy` says."""
    codebook_legacy: bool = flag(True, only=FIRST)
    """Whether beta weighs the codebook's term, as in latent-diffusion and diffusers; or else the
    commitment's, as in 1711.00937, equation 3. Without effect where `codebook_decay` is set: there
    the commitment is all, and beta its weight."""
    codebook_decay: float | None = number(None, high=1.0, under=True, only=FIRST)
    """Of a codebook that follows averages (1711.00937, appendix A.1), 0.99 there; left out, it
    learns by gradients."""
    perceptual_weight: float = number(1.0, only=FIRST)
    """Of LPIPS (1801.03924), which is on where its weights are given."""
    lpips: tuple[str, ...] = texts((), only=FIRST)
    """Files of LPIPS's weights; left out, it is off."""
    discriminator: bool = flag(False, only=FIRST)
    disc_start: int = whole(50_001, only=FIRST)
    """The step at which the discriminator begins to count, as in latent-diffusion's configs."""
    disc_weight: float = number(0.5, only=FIRST)
    """Times the adaptive weight (2012.09841, equation 7)."""
    disc_factor: float = number(1.0, only=FIRST)
    disc_loss: str = choice("hinge", ("hinge", "vanilla"), only=FIRST)


@dataclass(frozen=True, kw_only=True)
class Lora:
    """[lora]: low-rank updates (2106.09685) in place of the weights themselves."""

    rank: int = whole(8, low=1, high=4096)
    alpha: float | None = number(None, over=True)
    """Updates are scaled by alpha / rank; left out, it is the rank."""
    targets: tuple[str, ...] = texts(("to_q", "to_k", "to_v", "to_out.0"))
    """Ends of the names of the layers that get one."""


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """[mesh]: how devices share the work."""

    fsdp: int = whole(1, low=1)
    """Devices that the weights are split over; what is left is data parallel."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """[samples]: what is looked at while training; a first stage shows reconstructions instead."""

    prompts: tuple[str, ...] = texts((), only=SECOND)
    """What is drawn; left out, the first four captions of the data."""
    steps: int = whole(20, low=1, high=1000, only=SECOND)
    guidance_scale: float = number(7.5, only=SECOND)
    seed: int = whole(0, high=2**32 - 1)
    sampler: str = choice("dpmpp_2m", SAMPLERS, only=SECOND)


@dataclass(frozen=True, kw_only=True)
class Run:
    """All settings of a run, checked: build it with `read` or `from_dict`."""

    kind: str = choice(REQUIRED, KINDS)
    """first_stage trains an autoencoder, second_stage diffusion in its latents; scenes_text a text
    encoder on the captions of `scenes`, scenes_measure what reads their pictures."""
    description: str | None = text(None)
    """For people; nothing depends on it."""
    run: Steps
    model: Model
    data: Data
    optimizer: Optimizer
    ema: Ema
    loss: Loss
    lora: Lora | None
    """None is full fine-tuning."""
    mesh: Mesh
    samples: Samples


TABLES: dict[str, type] = {
    "run": Steps,
    "model": Model,
    "data": Data,
    "optimizer": Optimizer,
    "ema": Ema,
    "loss": Loss,
    "lora": Lora,
    "mesh": Mesh,
    "samples": Samples,
}
