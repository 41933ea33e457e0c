"""Settings are refused in one sentence that names the key and the mend, before jax is loaded."""

import dataclasses
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from sdjax import config
from sdjax.diffusion import profiles
from sdjax.errors import InputError
from sdjax.training import checks, losses, schema, settings
from sdjax.training.first_stage_loss import FirstStageLoss
from sdjax.training.lora import Lora as LoraTargets

SECOND = """
kind = "second_stage"
[run]
steps = 100
batch_size = 8
[model]
config = "sd1"
vae = "first/model"
[data]
source = "scenes"
height = 128
width = 256
"""
FIRST = SECOND.replace("second", "first").replace('vae = "first/model"', "")
ROOT = str(Path(config.__file__).parent.parent)


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "second.toml").write_text(SECOND)
    (tmp_path / "first.toml").write_text(FIRST)


def refused(source, *overrides):
    """The sentence that settings are refused with."""
    with pytest.raises(InputError) as error:
        settings.read(source, overrides)
    sentence = str(error.value)
    assert "\n" not in sentence and not sentence.endswith("."), sentence
    return sentence


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("run.stepz=3", "--set: there is no setting run.stepz: did you mean run.steps?"),
        ("learning_rate=1", "no setting learning_rate: did you mean optimizer.learning_rate?"),
        ("stepps=1", "no setting stepps: did you mean run.steps?"),
        ("run.lerning_rate=1", "did you mean optimizer.learning_rate?"),
        ("mesh.zzz=1", "there is no setting mesh.zzz: there are fsdp"),
        ("a.b.c=1", "there is no setting a.b.c: keys are of the form table.key"),
        ("optimiser.clip=1", "there is no table [optimiser]: did you mean [optimizer]?"),
        ("run.steps", "--set takes key=value, such as optimizer.learning_rate=1e-4, got 'run."),
        ("=3", "--set takes key=value"),
        ("run=3", "--set: run must be a table, [run], got 3"),
        ("kind=secondstage", "--set: kind must be one of first_stage, second_stage"),
        ("kind=secondstage", "try second_stage"),
        ("run.steps=0", "run.steps must be a whole number of at least 1, got 0"),
        ("run.steps=true", "run.steps must be a whole number of at least 1, got True"),
        ("run.steps=1e3", "got 1000.0: write 1000"),
        ("run.steps=many", "run.steps must be a whole number of at least 1, got 'many'"),
        ("run.seed=4294967296", "run.seed must be a whole number from 0 to 4294967295"),
        ("run.keep=0", "run.keep must be a whole number of at least 1, got 0"),
        ("run.accumulate=3", "run.batch_size (8) must be a multiple of run.accumulate (3): try 9"),
        ("run.steps=1\nrun.keep=2", "run.steps must be a whole number"),
        ("run.out=\0", "run.out must be a text that is not empty, got '\\x00': it holds a NUL"),
        ("run.out=\udcff", "it is not valid Unicode"),
        ("model.dtype=bf16", "one of float32, bfloat16, got 'bf16': try bfloat16"),
        ("model.train=unett", "got 'unett': try unet"),
        ('model.train=["unet", "unet"]', "must be a list of different names among unet"),
        ("model.train=vae", "model.train has vae or decoder, which are the first stage's: take"),
        ("model.config=", "model.config or model.load is missing"),
        ("model.load=a/b", "model.config (sd1) and model.load (a/b) are both given"),
        ("model.vae=", "model.vae is missing: a second stage needs a trained first one"),
        ("data.height=500", "must be a multiple of 8 pixels, got 500: try 496 or 504"),
        ("data.width=4", "got 4: try 8"),
        ("data.width=0", "data.width must be a multiple of 8 pixels, got 0"),
        ("data.height=", "second.toml: data.height is missing: give a multiple of 8 pixels"),
        ("data.flip=True", "data.flip must be true or false, got 'True': try true"),
        ("data.crop=centre", "data.crop must be one of center, random, got 'centre': try center"),
        ("data.source=[]", "data.source is an empty list: name a source"),
        ("data.source=3", "there is nothing at 3: give scenes, or a path"),
        ('data.source=["scenes", "x"]', "data.source names scenes beside other sources"),
        ("data.cache=c", "data.cache cannot hold scenes, which is endless: set data.count"),
        ("optimizer.learning_rate=0", "must be a finite number over 0, got 0"),
        ("optimizer.learning_rate=nan", "must be a finite number over 0, got nan"),
        ("optimizer.learning_rate=fast", "must be a finite number over 0, got 'fast'"),
        ("optimizer.warmup=101", "optimizer.warmup (101) is longer than run.steps (100)"),
        ("optimizer.final=2", "optimizer.final must be a finite number from 0 to 1, got 2"),
        ("optimizer.beta2=1", "must be a finite number of at least 0 and under 1, got 1"),
        ("optimizer.clip=inf", "optimizer.clip must be a finite number of at least 0, got inf"),
        ("optimizer.discriminator_learning_rate=1", "is a setting of kind 'first_stage'"),
        ("ema.decay=1.0", "ema.decay must be a finite number of at least 0 and under 1, got 1.0"),
        ("loss.caption_dropout=-0.1", "must be a finite number from 0 to 1, got -0.1"),
        ("loss.kl_weight=1", "loss.kl_weight is a setting of kind 'first_stage' and this run is"),
        ("loss.prediction=eps", "got 'eps': try epsilon"),
        ("lora={rank=4}", "model.load is missing: lora trains updates of a checkpoint's weights"),
        ("lora.rank=0", "lora.rank must be a whole number from 1 to 4096, got 0"),
        ("samples.sampler=eulr", "got 'eulr': try euler"),
        ("samples.guidance_scale=-1", "must be a finite number of at least 0, got -1"),
    ],
)
def test_a_wrong_override_is_refused_with_its_key_and_the_mend(override, sentence):
    if override == "data.source=3":
        with pytest.raises(InputError) as error:
            checks.check_files(settings.read("second.toml", [override]))
        assert sentence in str(error.value)
    else:
        assert sentence in refused("second.toml", override)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["loss.kind=l1", "loss.min_snr_gamma=5"],
            "weighs the squared error and loss.kind is 'l1'",
        ),
        (["loss.zero_snr=true", "loss.prediction=epsilon"], 'take "v_prediction"'),
        (["data.count=9", "data.source=images"], "data.count is for scenes, which is endless"),
        (["data.cache=c", "data.count=9", "data.crop=random"], "data.cache holds one crop"),
        (["data.cache=c", "data.count=9", "data.flip=true"], "data.cache holds an image one way"),
        (["model.config=", "model.load=a/b", "lora.targets=[]"], "lora.targets is an empty list"),
    ],
)
def test_a_contradiction_is_refused_with_both_keys(overrides, sentence):
    assert sentence in refused("second.toml", *overrides)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("lora.rank=4", "[lora] is for kind 'second_stage' and this run is 'first_stage'"),
        ("loss.kind=l2", "loss.kind is a setting of kind 'second_stage' and this run is 'first_st"),
        ("samples.prompts=a", "samples.prompts is a setting of kind 'second_stage'"),
        ("model.train=unet", "model.train of a first stage is vae or decoder, got unet"),
        ("model.train=decoder", "a decoder alone learns for the latents of a trained encoder"),
        ("loss.discriminator=true", "loss.disc_start (50001) is not before run.steps (100)"),
        ("loss.disc_loss=hing", "try hinge"),
        ("data.cache=c", "data.cache is a setting of kind 'second_stage'"),
    ],
)
def test_a_first_stage_refuses_what_is_not_its_own(override, sentence):
    assert sentence in refused("first.toml", override)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("steps", "stepz", "own.toml: there is no setting run.stepz: did you mean run.steps?"),
        ("[data]", "[dat]", "own.toml: there is no table [dat]: did you mean [data]?"),
        ("[data]", "[[data]]", "own.toml: data must be a table, [data], got [{"),
        ('kind = "second_stage"', "", "own.toml: kind is missing: give one of first_stage"),
        ("steps = 100", "", "own.toml: run.steps is missing: give a whole number of at least 1"),
        ("steps = 100", "steps = ", "own.toml is not valid TOML: Invalid value (at line 4"),
        ("steps = 100", "[run.sub]\nx = 1", "there is no setting run.sub: there are out, steps"),
        ("steps = 100", "steps = 2024-01-01", "run.steps must be a whole number"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, old, new, sentence):
    (tmp_path / "own.toml").write_text(SECOND.replace(old, new, 1))
    assert sentence in refused("own.toml")


def test_a_missing_file_is_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "bytes.toml").write_bytes(b"\xff")
    monkeypatch.setattr(settings, "names", lambda: ("scenes-first", "scenes"))
    assert "no settings at scene: did you mean scenes?" in refused("scene")
    assert "no settings at no/where.toml: shipped are scenes-first" in refused("no/where.toml")
    assert f"{tmp_path} is a folder: give a .toml file" in refused(str(tmp_path))
    assert "bytes.toml is not valid TOML" in refused("bytes.toml")
    assert "there are no settings at 'a\\x00b'" in refused("a\0b")


def test_every_shipped_run_can_be_read():
    given = {
        "finetune": ["model.load=org/name", "data.source=photos"],
        "lora": ["model.load=org/name", "data.source=photos"],
        "vae-kl-f8": ["data.source=photos"],
    }
    for name in settings.names():
        assert settings.read(name, given.get(name, [])).kind in schema.KINDS


def test_what_is_written_is_read_back_equal(tmp_path):
    for name, overrides in [
        ("second.toml", ['description=a "quoted" é\x7f\\ one', 'samples.prompts=["a, b", "c"]']),
        ("second.toml", ["model.config=", "model.load=org/name", "lora.rank=4", "data.count=7"]),
        ("first.toml", ["loss.lpips=x.pth", "loss.discriminator=true", "loss.disc_start=3"]),
    ]:
        run = settings.read(name, overrides)
        (tmp_path / "again.toml").write_text(settings.dumps(run), encoding="utf-8")
        assert settings.read("again.toml") == run
        assert settings.from_dict(settings.to_dict(run)) == run
        assert tomllib.loads(settings.dumps(run)) == settings.to_dict(run)
        assert hash(run) == hash(settings.from_dict(settings.to_dict(run)))


def test_overrides_are_toml_or_bare_words_and_the_last_counts():
    run = settings.read(
        "second.toml",
        [
            "run.steps=1_000",
            "optimizer.learning_rate=1",
            "optimizer.learning_rate=3e-4",
            "run.out=2024",
            "model.train=['unet', 'text_encoder']",
            "model.dtype = 'bfloat16'",
            "loss.min_snr_gamma=5",
            "loss.min_snr_gamma=",
            "description=2024-01-01",
        ],
    )
    assert (run.run.steps, run.optimizer.learning_rate, run.run.out) == (1000, 3e-4, "2024")
    assert run.model.train == ("unet", "text_encoder") and run.model.dtype == "bfloat16"
    assert run.loss.min_snr_gamma is None and run.description == "2024-01-01"
    assert settings.read("second.toml").run.out == "runs/second"


def test_the_defaults_pass_their_own_checks():
    for name in ("second.toml", "first.toml"):
        run = settings.read(name)
        assert settings.from_dict(settings.to_dict(run)) == run
    for cls in schema.TABLES.values():
        for field in dataclasses.fields(cls):
            kind, default = field.metadata["kind"], field.default
            if default is not dataclasses.MISSING and default is not None:
                assert kind.keep(default) == default, f"{cls.__name__}.{field.name}"


def test_names_are_those_that_there_are():
    assert schema.SAMPLERS == tuple(profiles.SAMPLERS)
    assert (schema.DISTANCES, schema.TIMESTEPS) == (losses.DISTANCES, losses.TIMESTEPS)
    assert set(LoraTargets().targets) == set(schema.Lora().targets)


def test_defaults_are_those_of_the_losses():
    ours, theirs = schema.Loss(), losses.DiffusionLoss()
    for name in ("kind", "huber_scale", "timesteps", "perturbation", "min_snr_gamma"):
        assert getattr(ours, name) == getattr(theirs, name), name
    first = FirstStageLoss()
    renamed = {"pixel": "pixel_loss", "codebook_beta": "beta", "codebook_decay": "ema_decay"}
    renamed |= {"codebook_legacy": "legacy"}
    same = ("reduction", "learn_logvar", "kl_weight", "codebook_weight", "perceptual_weight")
    same += ("disc_start", "disc_weight", "disc_factor", "disc_loss", *renamed)
    for name in same:
        assert getattr(ours, name) == getattr(first, renamed.get(name, name)), name


def test_a_resumed_run_keeps_what_its_weights_depend_on():
    run = settings.read("second.toml")
    saved = settings.to_dict(run)
    further = ["run.steps=200", "run.out=x", "run.keep=5", "data.workers=2", "samples.prompts=a"]
    checks.check_resumed(saved, settings.read("second.toml", further))
    other = settings.read("second.toml", ["optimizer.clip=2", "loss.min_snr_gamma=5"])
    assert checks.differences(saved, other) == ["optimizer.clip", "loss.min_snr_gamma"]
    with pytest.raises(InputError) as error:
        checks.check_resumed(saved, other)
    assert str(error.value) == (
        "runs/second holds a run with other settings: optimizer.clip (1.0, now 2.0), "
        "loss.min_snr_gamma (absent, now 5.0): set them back, or give run.out another folder"
    )


def test_missing_files_are_refused_by_key(tmp_path):
    (tmp_path / "runs").mkdir()
    for override, sentence in [
        ("model.config=sd9", "model.config 'sd9' is neither a shipped config ("),
        ("model.vae=runs/first", "model.vae: there is no model at runs/first"),
        ("data.source=imagez", "data.source: there is nothing at imagez"),
    ]:
        with pytest.raises(InputError) as error:
            checks.check_files(settings.read("second.toml", ["model.vae=.", override]))
        assert str(error.value).startswith(sentence)
    patterns = ["data.source=shards/{000..100}.tar", "model.vae=org/name"]
    checks.check_files(settings.read("second.toml", patterns))
    bundled = ["model.config=", "model.load=scenes", "model.vae=scenes"]
    checks.check_files(settings.read("second.toml", bundled))


def test_settings_are_read_without_jax():
    code = (
        "import sys; from sdjax.training import settings, checks\n"
        "run = settings.read('second.toml'); settings.dumps(run)\n"
        "sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": ROOT}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
