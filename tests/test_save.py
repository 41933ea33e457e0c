"""What is saved loads again with equal bytes, here and in torch's diffusers."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny

from sdjax.checkpoints import inspect, load, safetensors, save, single_file_saving
from sdjax.errors import InputError
from sdjax.model import FrozenConfig


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    """Hashes are remembered elsewhere than in the home of whoever runs the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "sd1"
    model, params = tiny.save_sd1(path)
    return path, model, params


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_load_save_load_is_byte_equal(saved, tmp_path):
    path, model, params = saved
    loaded, weights = load(path)
    assert loaded == model and hash(loaded) == hash(model)
    assert loaded.family == "sd1" and loaded.source == str(path)
    assert tiny.equal(weights, params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(weights))
    save(tmp_path / "again", loaded, weights)
    assert files(tmp_path / "again") == files(path)


def test_a_single_file_and_back(saved, tmp_path):
    path, model, params = saved
    with pytest.warns(UserWarning, match="x.safetensors does not hold the model's scheduler"):
        save(tmp_path / "x.safetensors", model, params)
    keys = set(safetensors.open(tmp_path / "x.safetensors"))
    assert "model.diffusion_model.input_blocks.0.0.weight" in keys


def test_a_single_file_says_what_it_does_not_hold(saved):
    import peers

    for family in ("sd1", "sd2", "sdxl", "x4-upscaler"):
        config = json.loads(peers.scheduler(family).to_json_string())
        model = replace(saved[1], family=family, scheduler=FrozenConfig.of(config))
        assert single_file_saving.lost(model) == "", family
        for change in (
            {"_class_name": "UniPCMultistepScheduler"},
            {"timestep_spacing": "trailing"},
            {"beta_end": 0.013},
        ):
            other = replace(model, scheduler=FrozenConfig.of(config | change))
            assert "scheduler" in single_file_saving.lost(other), (family, change)
    # The markers say these, and their reader takes trailing timesteps.
    said = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    config |= said | {"timestep_spacing": "trailing"}
    model = replace(saved[1], family="x4-upscaler", scheduler=FrozenConfig.of(config))
    assert single_file_saving.lost(model) == ""


@pytest.mark.parametrize("family", ["sd2", "sd1-inpaint"])
def test_torch_diffusers_loads_other_families_with_equal_weights(family, tmp_path):
    import diffusers
    from peers import few_layers, flax_params, save_tiny_pipeline

    theirs = save_tiny_pipeline(tmp_path / "theirs", family, **few_layers(family))
    model, params = load(tmp_path / "theirs")
    save(tmp_path / "ours", model, params)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours")
    assert type(pipeline) is type(theirs)
    for name in ("unet", "vae", "text_encoder"):
        ours = jax.tree.map(np.asarray, params[name])
        assert tiny.equal(ours, flax_params(getattr(pipeline, name))), name
    for key in ("prediction_type", "set_alpha_to_one", "steps_offset", "beta_end"):
        assert pipeline.scheduler.config[key] == theirs.scheduler.config[key], key
    assert type(pipeline.scheduler) is type(theirs.scheduler)
    assert pipeline.tokenizer.pad_token == theirs.tokenizer.pad_token


def test_torch_diffusers_loads_it_with_equal_weights(saved):
    import torch
    from diffusers import StableDiffusionPipeline

    path, _, params = saved
    pipeline = StableDiffusionPipeline.from_pretrained(path)
    from peers import flax_params

    for name in ("unet", "vae", "text_encoder"):
        theirs = flax_params(getattr(pipeline, name))
        assert tiny.equal(jax.tree.map(np.asarray, params[name]), theirs), name
    assert pipeline.safety_checker is None
    assert type(pipeline.scheduler).__name__ == "DDIMScheduler"
    assert pipeline.scheduler.config.set_alpha_to_one is False
    ids = pipeline.tokenizer(["a cat"], padding="max_length", max_length=77).input_ids
    np.testing.assert_array_equal(ids, saved[1].tokenizer(["a cat"]).ids)
    assert pipeline.unet.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_cast_when_saving(saved, tmp_path, dtype):
    _, model, params = saved
    save(tmp_path / "x", model, params, dtype=dtype)
    report = inspect(tmp_path / "x")
    assert report.dtypes == (dtype,)
    _, weights = load(tmp_path / "x")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(weights)} == {dtype}
    np.testing.assert_array_equal(
        np.asarray(weights["unet"]["conv_in"]["kernel"]),
        params["unet"]["conv_in"]["kernel"].astype(np.dtype(dtype)),
    )


def test_nothing_is_overwritten_unasked(saved, tmp_path):
    _, model, params = saved
    for name in ("x", "x.safetensors"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("keep")
        for overwrite in (False, True):
            with pytest.raises(InputError, match="give another path"):
                save(tmp_path / name, model, params, overwrite=overwrite)
    assert (tmp_path / "x" / "mine").read_text() == "keep"
    assert sorted(os.listdir(tmp_path)) == ["x", "x.safetensors"]


def test_an_empty_folder_is_filled_and_a_checkpoint_replaced_when_asked(saved, tmp_path):
    path, model, params = saved
    (tmp_path / "x").mkdir()
    save(tmp_path / "x", model, params)
    save(tmp_path / "x", model, params, overwrite=True)
    assert files(tmp_path / "x") == files(path)
    assert os.listdir(tmp_path) == ["x"]


def test_params_of_another_model_are_refused(saved, tmp_path):
    _, model, params = saved
    less = {**params, "vae": {k: v for k, v in params["vae"].items() if k != "encoder"}}
    with pytest.raises(InputError, match="params lack 'vae/encoder/"):
        save(tmp_path / "x", model, less)
    more = {**params, "vae": {**params["vae"], "lora": np.ones(3, np.float32)}}
    with pytest.raises(InputError, match="'vae/lora'"):
        save(tmp_path / "x", model, more)
    with pytest.raises(InputError, match="params lack 'unet/"):
        save(tmp_path / "x", model, {})
    assert os.listdir(tmp_path) == []


def test_a_failed_save_leaves_nothing(saved, tmp_path):
    _, model, params = saved
    large = {**params, "vae": jax.tree.map(lambda a: np.full_like(a, 1e6), params["vae"])}
    with pytest.raises(InputError, match="too large for float16"):
        save(tmp_path / "x", model, large, dtype="float16")
    assert os.listdir(tmp_path) == []


def test_inspect_says_what_it_is_without_reading_weights(saved, monkeypatch):
    import hashlib

    from sdjax.checkpoints import tensors

    path, _, params = saved

    def read(*arguments):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(tensors.np, "frombuffer", read)
    with pytest.raises(AssertionError, match="a weight was read"):
        load(path)
    report = inspect(path)
    assert (report.family, report.prediction, report.dtypes) == ("sd1", "epsilon", ("float32",))
    assert report.parameters == sum(a.size for a in jax.tree.leaves(params))
    for file in report.files:
        assert file.sha256 == hashlib.sha256(file.path.read_bytes()).hexdigest()
    text = str(report)
    assert f"{report.parameters:,}" in text and report.files[0].sha256 in text
    monkeypatch.setattr(hashlib, "file_digest", read)
    assert inspect(path).sha256 == report.sha256  # remembered


def test_progress_counts_every_byte(saved):
    path, _, params = saved
    seen = []
    load(path, progress=lambda done, total: seen.append((done, total)))
    total = sum(a.nbytes for a in jax.tree.leaves(params))
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


PEAK = """
import gc, json, sys
import jax
from sdjax.checkpoints.finding import find
from sdjax.checkpoints.loading import load

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

find(sys.argv[1])
jax.device_put(0.0)  # starts the backend, as the first load in a process does
gc.collect()
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
_, params = load(sys.argv[1], dtype=sys.argv[2] if len(sys.argv) > 2 else None)
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(json.dumps([size, status("VmHWM") - before]))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="Linux counts the peak")
@pytest.mark.parametrize("dtype", [[], ["bfloat16"]])
def test_loading_peaks_at_most_1_3_times_the_params(saved, tmp_path_factory, dtype):
    """On 100 MB, one tensor of which is a fifth; real checkpoints have smaller parts."""
    from sdjax.models.unet import UNet

    path = tmp_path_factory.getbasetemp() / "large"
    if not path.exists():
        _, model, params = saved
        unet = UNet.from_config(tiny.UNET | {"block_out_channels": [128, 448]})
        weights = {**params, "unet": tiny.random_params(unet)}
        save(path, replace(model, unet=unet), weights)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(path), *dtype],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"},
    )
    size, peak = json.loads(run.stdout)
    assert size > 40e6
    assert peak <= 1.3 * size, (peak, size)
