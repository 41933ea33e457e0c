"""Diffusers folders in all their layouts."""

import json
import os
import shutil
import types

import jax
import numpy as np
import pytest
import tiny

from sdjax.checkpoints import folder, hub, inspect, load, load_vae, naming, safetensors
from sdjax.checkpoints.safetensors import Entry, entry
from sdjax.errors import InputError

STEM = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "sd1"
    _, params = tiny.save_sd1(path)
    return path, params


@pytest.fixture
def copy(good, tmp_path):
    shutil.copytree(good[0], tmp_path / "model", copy_function=os.link)
    return tmp_path / "model"


def weights(path):
    return load(path)[1]


def half(path, to):
    """The weights of one file as float16 in another."""
    entries = [
        Entry(k, t.shape, np.dtype(np.float16), lambda t=t: t.read().astype(np.float16))
        for k, t in safetensors.open(path).items()
    ]
    safetensors.write(to, entries)


def shards(path, names, index):
    """Split a file into shards with an index."""
    tensors = safetensors.open(path)
    places = {key: names[i % len(names)] for i, key in enumerate(sorted(tensors))}
    for name in names:
        chosen = [entry(tensor) for key, tensor in tensors.items() if places[key] == name]
        safetensors.write(path.parent / name, chosen)
    (path.parent / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    path.unlink()


def test_pickled_weights_load_as_safetensors_do(good, copy):
    import torch
    from safetensors.torch import load_file

    for file in list(copy.rglob("*.safetensors")):
        name = "pytorch_model.bin" if file.parent.name == "text_encoder" else f"{STEM}.bin"
        new = file.parent.name != "vae"  # both of torch's formats
        torch.save(load_file(file), file.parent / name, _use_new_zipfile_serialization=new)
        file.unlink()
    assert tiny.equal(weights(copy), good[1])


def test_safetensors_are_preferred_to_pickles(good, copy):
    (copy / "unet" / f"{STEM}.bin").write_bytes(b"not read")
    assert tiny.equal(weights(copy), good[1])


@pytest.mark.parametrize(
    "names, index",
    [
        (
            [f"{STEM}-00001-of-00002.safetensors", f"{STEM}-00002-of-00002.safetensors"],
            f"{STEM}.safetensors.index.json",
        ),
        (
            [f"{STEM}.fp16-00001-of-00002.safetensors", f"{STEM}.fp16-00002-of-00002.safetensors"],
            f"{STEM}.safetensors.index.fp16.json",
        ),
        (
            [f"{STEM}-00001-of-00002.fp16.safetensors", f"{STEM}-00002-of-00002.fp16.safetensors"],
            f"{STEM}.safetensors.index.fp16.json",
        ),
    ],
)
def test_shards_with_their_index(good, copy, names, index):
    shards(copy / "unet" / f"{STEM}.safetensors", names, index)
    assert tiny.equal(weights(copy), good[1])


def test_a_variant_is_taken_when_asked_for_or_when_it_is_the_only_one(good, copy):
    plain = copy / "unet" / f"{STEM}.safetensors"
    half(plain, copy / "unet" / f"{STEM}.fp16.safetensors")
    assert load(copy)[1]["unet"]["conv_in"]["bias"].dtype == "float32"
    _, params = load(copy, variant="fp16")
    assert params["unet"]["conv_in"]["bias"].dtype == "float16"
    assert params["vae"]["encoder"]["conv_in"]["bias"].dtype == "float32"
    plain.unlink()
    assert load(copy)[1]["unet"]["conv_in"]["bias"].dtype == "float16"


def test_which_file_is_taken_among_many():
    names = [
        f"{STEM}.bin",
        f"{STEM}.safetensors",
        f"{STEM}.fp16.bin",
        f"{STEM}.fp16.safetensors",
        f"{STEM}.non_ema.safetensors",
        f"{STEM}.safetensors.index.json",
        f"{STEM}-00001-of-00002.safetensors",
        "flax_model.msgpack",
        "openvino_model.bin",
    ]
    found = folder.candidates(names)
    assert found == {None: f"{STEM}.safetensors", "fp16": f"{STEM}.fp16.safetensors"}
    assert folder.candidates(["model.safetensors.index.fp16.json", "model.fp16.bin"]) == {
        "fp16": "model.safetensors.index.fp16.json"
    }
    with pytest.raises(InputError, match="'bf16', 'fp16'"):
        folder.choose({"fp16": "a", "bf16": "b"}, None, "unet")


def cache(good, root):
    """The Hub's cache of a model: a snapshot of links to blobs."""
    model = root / "models--org--name"
    snapshot = model / "snapshots" / "0123abc"
    (model / "refs").mkdir(parents=True)
    (model / "blobs").mkdir()
    (model / "refs" / "main").write_text("0123abc")
    for i, file in enumerate(sorted(p for p in good.rglob("*") if p.is_file())):
        os.link(file, model / "blobs" / str(i))
        link = snapshot / file.relative_to(good)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(model / "blobs" / str(i), link.parent))
    return model, snapshot


def test_the_hubs_cache_and_its_links(good, tmp_path):
    model, snapshot = cache(good[0], tmp_path)
    assert folder.snapshot(model) == snapshot
    assert tiny.equal(weights(model), good[1])
    (model / "refs" / "main").write_text("../../../etc")
    with pytest.raises(InputError, match="refs/main"):
        load(model)
    (model / "refs" / "main").unlink()
    assert folder.snapshot(model) == snapshot
    (snapshot / "unet" / f"{STEM}.safetensors").resolve().unlink()
    with pytest.raises(InputError, match="is a link to .*blobs.* not there"):
        load(model)


def test_a_hub_id_fetches_what_is_loaded_and_no_more(monkeypatch, good, tmp_path):
    import huggingface_hub
    from huggingface_hub.hf_api import RepoSibling

    files = [str(p.relative_to(good[0])) for p in good[0].rglob("*") if p.is_file()]
    more = [f"unet/{STEM}.bin", f"unet/{STEM}.fp16.safetensors", "v1-5.ckpt", "README.md"]
    more += ["safety_checker/model.safetensors"]
    asked = {}

    class Api:
        def model_info(self, name, timeout):
            return types.SimpleNamespace(siblings=[RepoSibling(file) for file in files + more])

    def download(name, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(good[0])

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    model, _ = load("org/name")
    assert asked["name"] == "org/name" and model.source == "org/name"
    assert set(asked["patterns"]) == set(files)
    assert f"unet/{STEM}.fp16.safetensors" in hub.wanted(files + more, "fp16")
    with pytest.raises(InputError, match="v1-5.ckpt"):
        hub.wanted(["v1-5.ckpt"])


@pytest.mark.parametrize("name", [f"{STEM}.fp16-{{}}", f"{STEM}-{{}}.fp16"])
def test_of_a_hub_ids_shards_one_variant_is_fetched(name):
    many = ["00001-of-00002", "00002-of-00002"]
    plain = {f"unet/{STEM}-{number}.safetensors" for number in many}
    half = {f"unet/{name.format(number)}.safetensors" for number in many}
    indices = {f"unet/{STEM}.safetensors.index{end}.json" for end in ("", ".fp16")}
    others = [f"unet/{STEM}-00001-of-00002.bin", f"unet/{STEM}.bin.index.json"]
    files = ["model_index.json", "unet/config.json", *plain, *half, *indices, *others]
    for variant, shards in ((None, plain), ("fp16", half)):
        wanted = hub.wanted(files, variant)
        assert {file for file in wanted if "-of-" in file} == shards
        assert len(indices & set(wanted)) == 1 and len(wanted) == 5
    with pytest.raises(InputError, match="none of its shards"):
        hub.wanted([file for file in files if "-of-" not in file])


def test_where_there_is_no_network_a_hub_id_is_taken_from_the_cache(monkeypatch, good, tmp_path):
    from huggingface_hub import HfApi, constants

    class Unreachable(Exception):
        """HTTP libraries have errors of their own, which are no OSErrors."""

    def fail(self, name, timeout):
        raise Unreachable("no route to the Hub")

    monkeypatch.setattr(HfApi, "model_info", fail)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    cache(good[0], tmp_path / "hub")
    assert tiny.equal(weights("org/name"), good[1])
    with pytest.raises(InputError, match=r"org/other .*\(no route to the Hub\): check the name"):
        load("org/other")


@pytest.mark.parametrize("family", ["sdxl", "sdxl-refiner", "x4-upscaler"])
def test_folders_that_diffusers_wrote(family, tmp_path):
    from peers import flax_params, save_tiny_pipeline

    pipeline = save_tiny_pipeline(tmp_path / family, family)
    model, params = load(tmp_path / family)
    assert model.family == family
    assert model.zero_negative == (family == "sdxl")
    assert (model.text_encoder is None) == (family == "sdxl-refiner")
    for name, tree in params.items():
        assert tiny.equal(jax.tree.map(np.asarray, tree), flax_params(getattr(pipeline, name)))


def test_an_autoencoder_alone_in_its_folder(tmp_path):
    from peers import flax_params, tiny_vae

    theirs, _ = tiny_vae("sdxl", {"layers_per_block": 1})
    theirs.save_pretrained(tmp_path / "vae")
    vae, params = load_vae(tmp_path / "vae")
    assert vae.scaling_factor == 0.13025
    assert tiny.equal(jax.tree.map(np.asarray, params), flax_params(theirs))
    report = inspect(tmp_path / "vae")
    assert (report.family, report.layout) == ("autoencoder", "diffusers folder")
    assert report.parameters == sum(p.numel() for p in theirs.parameters())
    with pytest.raises(InputError, match="an autoencoder and no UNet"):
        load(tmp_path / "vae")
    with pytest.raises(InputError, match="no weights of the variant 'fp16': it has only plain"):
        load_vae(tmp_path / "vae", variant="fp16")


def test_the_names_of_a_network_are_traced_once():
    model, _ = tiny.sd1()
    again, _ = tiny.sd1()
    assert naming.leaves(model.unet) is naming.leaves(again.unet)
