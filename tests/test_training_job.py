"""Runs of every kind from settings to what torch loads, at sizes of a few thousand parameters."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny
from PIL import Image

import sdjax
from sdjax.errors import InputError
from sdjax.training import data, feeding, settings
from sdjax.training.fresh import fresh
from sdjax.training.job import job
from sdjax.training.loop import train
from sdjax.training.scenes import measure

SMALL = {
    "unet": tiny.UNET
    | {
        "sample_size": 32,
        "block_out_channels": [16],
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["UpBlock2D"],
    },
    "vae": tiny.VAE
    | {"sample_size": 64, "block_out_channels": [8, 8], "mid_block_add_attention": False},
    "text_encoder": {
        "vocab_size": 839,
        "max_position_embeddings": 32,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "hidden_act": "quick_gelu",
        "bos_token_id": 837,
        "eos_token_id": 838,
    },
    "tokenizer": {"vocabulary": "scenes", "model_max_length": 32},
    "scheduler": tiny.SCHEDULER | {"prediction_type": "v_prediction"},
}
STEPS = {"steps": 2, "batch_size": 2, "log_every": 1, "sample_every": 0}
SCENES = {"source": "scenes", "height": 64, "width": 64}


def toml(tables) -> str:
    """Tables of plain values as TOML."""
    lines = []
    for name, table in tables.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    return "\n".join(lines)


def trained(kind, out, steps=STEPS, **tables):
    said = []
    run = settings.from_dict({"kind": kind, "run": steps | {"out": str(out)}} | tables)
    return train(run, note=said.append), said


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    (folder / "small.toml").write_text(toml(SMALL))
    photos = folder / "photos"
    photos.mkdir()
    lines = []
    for number in range(4):
        pixels = np.full((80, 72, 3), 60 * number, np.uint8)
        Image.fromarray(pixels).save(photos / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"grey number {number}"}))
    (photos / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def bundle(home):
    """Both stages of a model of one's own: the first stage's folder, the second's, its notes."""
    config = {"config": str(home / "small.toml")}
    vae, _ = trained("first_stage", home / "first", model=config, data=SCENES)
    model, said = trained(
        "second_stage",
        home / "second",
        steps=STEPS | {"sample_every": 2},
        model=config | {"vae": str(vae), "train": ["unet", "text_encoder"]},
        data=SCENES | {"count": 4, "cache": str(home / "latents")},
        samples={"prompts": ["a red house"], "steps": 2},
    )
    return vae, model, said


def test_both_stages_make_a_model_that_torch_and_sdjax_sample_alike(bundle):
    import torch
    from diffusers import StableDiffusionPipeline

    vae, folder, said = bundle
    assert "cached 4 of 4 examples" in said
    model, params = sdjax.load(folder)
    scale = json.loads((vae / "config.json").read_text())["scaling_factor"]
    assert model.vae.scaling_factor == pytest.approx(scale)
    start = np.random.default_rng(0).standard_normal((1, 32, 32, 4)).astype(np.float32)
    ours = sdjax.text_to_image(
        model, params, "a red house at night", latents=start, steps=4, output="latents"
    )
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        "a red house at night",
        latents=torch.tensor(start.transpose(0, 3, 1, 2)),
        num_inference_steps=4,
        output_type="latent",
    ).images.numpy()
    theirs = theirs.transpose(0, 2, 3, 1)
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


def test_a_cache_is_refused_where_anything_that_made_it_differs(home, bundle):
    """One of before has the tokenizers' and the files' marks not, and is taken."""
    cache = home / "latents" / "cache.json"
    made = json.loads(cache.read_text())
    tables = {
        "model": {"load": str(bundle[1]), "train": ["unet", "text_encoder"]},
        "data": SCENES | {"count": 4, "cache": str(home / "latents")},
        "run": STEPS | {"out": str(home / "no")},
        "kind": "second_stage",
    }
    run = settings.from_dict(tables)
    for change, said in [
        ({}, "made with dtype 'float32', and now it is 'bfloat16'"),
        ({"tokenizers": {"ids": "another"}}, "made with tokenizers"),
        ({"text_encoder_2": "another"}, "made with text_encoder_2 'another'"),
        ({"files": "another"}, "made with files 'another'"),
        ({"caption_column": "title"}, "made with caption_column 'title'"),
    ]:
        cache.write_text(json.dumps(made | {"made_of": made["made_of"] | change}))
        other = dataclasses.replace(run.model, dtype="float32" if change else "bfloat16")
        with pytest.raises(InputError, match=said):
            job(dataclasses.replace(run, model=other), print)
    new = ("files", "caption_column", "text_encoder_2", "tokenizers", "dtype")
    old = {key: value for key, value in made["made_of"].items() if key not in new}
    cache.write_text(json.dumps(made | {"made_of": old}))
    with job(run, print).batches as batches:
        assert next(batches)["mean"].shape == (2, 32, 32, 4)
    cache.write_text(json.dumps(made))


def test_what_cannot_be_read_is_counted_for_the_user(home, bundle, tmp_path):
    """In the metrics and in a sentence; and nothing stands for it in a cache."""
    for number in range(4):
        Image.new("L", (64, 64), 60 * number).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"grey number {number}")
    (tmp_path / "2.png").write_bytes(b"\x89PNG and no more")
    photos = {"source": str(tmp_path), "height": 64, "width": 64}
    with pytest.warns(UserWarning, match=r"skipped 2\.png"):
        path, said = trained(
            "first_stage", home / "broken", model={"config": str(home / "small.toml")}, data=photos
        )
    assert "examples that could not be read and were skipped: 1, see the warnings" in said
    lines = (path.parent / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["skipped"] == 1
    tables = {
        "kind": "second_stage",
        "run": STEPS | {"out": str(home / "no"), "batch_size": 4},
        "model": {"load": str(bundle[1])},
        "data": photos | {"cache": str(tmp_path / "cache")},
    }
    for _ in range(2):  # made, and found
        said = []
        with pytest.warns(UserWarning, match=r"skipped 2\.png"):
            with job(settings.from_dict(tables), said.append).batches as batches:
                assert len(np.unique(next(batches)["mean"], axis=0)) == 3
        assert "examples that cannot be read, and are left out of the cache: 1 of 4" in said


def test_a_decoder_alone_learns_and_latents_stay_what_they_were(home, bundle):
    old, *_ = bundle
    new, _ = trained(
        "first_stage", home / "decoder", model={"load": str(old), "train": "decoder"}, data=SCENES
    )
    assert (new / "config.json").read_text() == (old / "config.json").read_text()
    before, after = (
        safetensors.numpy.load_file(folder / "diffusion_pytorch_model.safetensors")
        for folder in (old, new)
    )
    moved = {key.split(".")[0] for key in before if (before[key] != after[key]).any()}
    assert moved == {"decoder", "post_quant_conv"}


def test_samples_are_drawn_and_logged(bundle):
    home = bundle[1].parent
    assert Image.open(home / "samples" / "00000002.png").size[0] >= 64
    assert (home / "curves.png").exists()


def test_a_finetuned_checkpoint_is_still_one_and_has_moved(home, bundle):

    before = sdjax.load(bundle[1])[1]
    folder, _ = trained(
        "second_stage",
        home / "fine",
        steps=STEPS | {"sample_every": 2},
        model={"load": str(bundle[1]), "train": ["unet"], "remat": True},
        data={"source": str(home / "photos"), "height": 64, "width": 64},
        samples={"steps": 2},
    )
    with Image.open(folder.parent / "samples" / "00000002.png") as sheet:
        assert sheet.size[0] >= 128  # two by two, of the data's captions
    after = sdjax.load(folder)[1]
    assert tiny.equal(before["text_encoder"], after["text_encoder"])
    assert tiny.equal(before["vae"], after["vae"])
    assert not tiny.equal(before["unet"], after["unet"])


def test_samples_are_of_the_first_captions_or_a_note_says_that_there_are_none(bundle, tmp_path):
    for number, caption in enumerate(["b", "a", "b", "", "c", "broken", "d", "e"]):
        Image.new("L", (64, 64), 9 * number).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(caption)
    (tmp_path / "5.png").write_bytes(b"")
    assert feeding.captions(data.open(tmp_path), 4) == ("b", "a", "c", "d")
    for file in tmp_path.glob("*.txt"):
        file.write_text("")
    tables = {
        "kind": "second_stage",
        "run": STEPS | {"out": str(tmp_path / "no"), "sample_every": 2},
        "model": {"load": str(bundle[1])},
        "data": {"source": str(tmp_path), "height": 64, "width": 64},
    }
    said = []
    made = job(settings.from_dict(tables), said.append)
    assert said == [
        "no samples are drawn: the data have no captions, and samples.prompts is not set"
    ]
    assert made.picture(made.params, ()) is None


def test_a_codebook_and_a_discriminator_learn_together(home):
    """The discriminator counts from the second step on; its norms are the batch's own."""
    table = SMALL["vae"] | {"_class_name": "VQModel", "num_vq_embeddings": 16, "sample_size": 64}
    (home / "vq.toml").write_text(toml({"vae": table}))
    loss = {"discriminator": True, "disc_start": 1, "codebook_legacy": False, "codebook_beta": 0.5}
    small = {"source": str(home / "photos"), "height": 32, "width": 32}
    config = {"config": str(home / "vq.toml")}
    folder, _ = trained("first_stage", home / "vq", model=config, data=small, loss=loss)
    first, second = map(json.loads, (folder.parent / "metrics.jsonl").read_text().splitlines())
    assert first["disc_loss"] == first["d_weight"] == first["grad_norm/discriminator"] == 0
    assert min(second[n] for n in ("disc_loss", "d_weight", "grad_norm/discriminator")) > 0
    assert 1 <= second["perplexity"] <= 16 and second["codebook"] > 0
    assert json.loads((folder / "config.json").read_text())["_class_name"] == "VQModel"
    tables = {"kind": "first_stage", "run": STEPS | {"out": "no"}, "model": config, "data": small}
    stage = job(settings.from_dict(tables | {"loss": loss}), print).stage
    assert (stage.loss.legacy, stage.loss.beta, stage.loss.ema_decay) == (False, 0.5, None)


@pytest.mark.parametrize(
    ("table", "change", "said"),
    [
        ("scheduler", None, r"small.toml has no \[scheduler\]: a model needs one"),
        (
            "unet",
            {"cross_attention_dim": 48},
            "UNet's cross_attention_dim is 48, and hidden_size of text_encoder gives 32: make them",
        ),
        (
            "text_encoder",
            {"vocab_size": 838},
            "vocab_size of its text_encoder is 838, and its tokenizer has 839 ids: make them equal",
        ),
        (
            "text_encoder",
            {"max_position_embeddings": 16},
            "max_position_embeddings of its text_encoder is 16, and its tokenizer makes 32 ids",
        ),
        ("unet", {"out_channels": 8}, "out_channels is 8, and the autoencoder's latent_channels 4"),
    ],
)
def test_a_config_whose_parts_do_not_fit_is_refused(bundle, tmp_path, table, change, said):
    config = {name: SMALL[name] | (change or {} if name == table else {}) for name in SMALL}
    if change is None:
        del config[table]
    (tmp_path / "small.toml").write_text(toml(config))
    tables = {
        "kind": "second_stage",
        "run": STEPS | {"out": str(tmp_path / "no")},
        "model": {"config": str(tmp_path / "small.toml"), "vae": str(bundle[0])},
        "data": SCENES,
    }
    with pytest.raises(InputError, match=said) as error:
        job(settings.from_dict(tables), print)
    assert "\n" not in str(error.value)


def test_a_lora_is_written_and_changes_the_unet(home, bundle):
    from sdjax.checkpoints.lora import load_lora
    from sdjax.models.lora import merge

    file, _ = trained(
        "second_stage",
        home / "lora",
        model={"load": str(bundle[1])},
        data={"source": str(home / "photos"), "height": 64, "width": 64},
        optimizer={"learning_rate": 1e-2},
        lora={"rank": 2},
    )
    model, params = sdjax.load(bundle[1])
    merged = merge(params, load_lora(file, model))
    assert not tiny.equal(params["unet"], merged["unet"])


def test_a_text_encoder_learns_from_captions_and_the_second_stage_goes_on_with_it(home, bundle):
    """One word at a time: the embedding of a word that no caption has shown has not moved."""
    path, _ = trained(
        "scenes_text",
        home / "text",
        steps=STEPS | {"batch_size": 8},
        model={"config": str(home / "small.toml")},
        data=SCENES,
        ema={"decay": 0.0},
    )
    model, params = sdjax.load(path, dtype="float32")
    begun = fresh(
        model.text_encoder, jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), 0)
    )
    table = [
        tree["embeddings"]["token_embedding"]["embedding"]
        for tree in (begun, params["text_encoder"])
    ]
    assert model.tokenizer is not None and (np.abs(table[1] - table[0]) > 1e-4).any()
    with pytest.raises(InputError, match="data.source of kind 'scenes_text' is scenes alone"):
        trained(
            "scenes_text",
            home / "no",
            model={"config": str(home / "small.toml")},
            data=SCENES | {"source": str(home / "photos")},
        )


def test_the_measure_is_trained_by_the_same_loop(home):
    path, _ = trained("scenes_measure", home / "measure", data=SCENES, ema={"decay": 0.5})
    assert (
        path.name == "measure.safetensors" and path.stat().st_size == measure.WEIGHTS.stat().st_size
    )
    assert (path.parent / "measure-last.safetensors").is_file()
    with pytest.raises(InputError, match=r"\[model\] is of no use to the measure"):
        trained("scenes_measure", home / "no", data=SCENES, model={"config": "scenes"})
