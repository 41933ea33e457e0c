"""What is refused: one sentence that names the file and the key, whatever a stranger wrote."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
from tiny import save_sd1

from sdjax.checkpoints import inspect, load, pickles, safetensors
from sdjax.checkpoints.autoencoder import load_autoencoder
from sdjax.checkpoints.safetensors import Entry
from sdjax.errors import InputError

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
LAST = "text_model.final_layer_norm.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A good folder, never written to."""
    path = tmp_path_factory.mktemp("good") / "sd1"
    save_sd1(path)
    return path


@pytest.fixture
def folder(good, tmp_path):
    """A copy of the good folder by hard links: whoever changes a file must replace it."""
    shutil.copytree(good, tmp_path / "model", copy_function=os.link)
    return tmp_path / "model"


def refused(path, *words, **arguments):
    """Check that loading is refused in one line that has all the words."""
    with pytest.raises(InputError) as caught:
        load(path, **arguments)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 1200
    for word in words:
        assert str(word) in text, text


def change(path, edit):
    """Rewrite a safetensors file after `edit` has changed its dict of arrays."""
    arrays = {key: tensor.read() for key, tensor in safetensors.open(path).items()}
    edit(arrays)
    entries = [Entry(k, a.shape, a.dtype, lambda a=a: a) for k, a in arrays.items()]
    safetensors.write(path, entries)


def replace(path, data):
    path.unlink(missing_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())


def edit_json(path, **changes):
    replace(path, json.loads(path.read_text()) | changes)


def test_the_folder_is_good_without_a_fault(good):
    load(good)


def test_a_missing_key(folder):
    change(folder / UNET, lambda arrays: arrays.pop("conv_in.weight"))
    refused(folder, folder / UNET, "lacks the key 'conv_in.weight'")


def test_many_missing_keys(folder):
    change(folder / VAE, lambda a: [a.pop(key) for key in list(a) if key.startswith("decoder")])
    refused(folder, folder / VAE, "keys ('decoder.", ", ...")


def test_an_extra_key(folder):
    change(folder / UNET, lambda a: a.update({"lora.up": np.ones(3, np.float32)}))
    refused(folder, folder / UNET, "the key 'lora.up'")


def test_the_documented_extra_key_is_tolerated(folder):
    change(
        folder / TEXT,
        lambda a: a.update({"text_model.embeddings.position_ids": np.arange(77)[None]}),
    )
    load(folder)


def test_one_weight_under_two_spellings(folder):
    key = "final_layer_norm.weight"
    change(folder / TEXT, lambda a: a.update({key: a[f"text_model.{key}"]}))
    refused(folder, folder / TEXT, key, "two spellings")


def test_a_wrong_shape(folder):
    change(folder / UNET, lambda a: a.update({"conv_in.bias": np.ones(3, np.float32)}))
    refused(folder, folder / UNET, "'conv_in.bias' has shape [3]", "needs [16]")


def test_a_transposed_kernel(folder):
    change(folder / UNET, lambda a: a.update({"conv_in.weight": a["conv_in.weight"].T.copy()}))
    refused(folder, folder / UNET, "'conv_in.weight' has shape [3, 3, 4, 16]")


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.bool_])
def test_integer_weights(folder, dtype):
    change(folder / UNET, lambda a: a.update({"conv_in.bias": np.ones(16, dtype)}))
    refused(folder, folder / UNET, "'conv_in.bias'", np.dtype(dtype).name, "float")


def test_nan(folder):
    change(folder / TEXT, lambda a: a.update({LAST: np.where(a[LAST] == a[LAST][-1], np.nan, 1)}))
    before = len(jax.live_arrays())
    with pytest.raises(InputError) as caught:
        load(folder)
    assert len(jax.live_arrays()) == before, "arrays live as long as the error"
    for word in (str(folder / TEXT), LAST, "holds NaN or infinity"):
        assert word in str(caught.value)


def test_a_value_too_large_for_the_dtype_asked_for(folder):
    change(folder / TEXT, lambda a: a.update({LAST: np.full_like(a[LAST], 1e6)}))
    refused(folder, folder / TEXT, LAST, "too large for float16", dtype="float16")


@pytest.mark.parametrize("dtype", ["float8", "int8", "float64", np.int32, object()])
def test_an_unknown_dtype(folder, dtype):
    refused(folder, "dtype must be one of float32, bfloat16, float16", dtype=dtype)


def test_a_truncated_file(folder):
    replace(folder / VAE, (folder / VAE).read_bytes()[:-1000])
    refused(folder, folder / VAE, "cut short")


LFS = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 3438167540\n"
)


@pytest.mark.parametrize("name", [UNET, "model_index.json", "unet/config.json"])
def test_a_git_lfs_pointer(folder, name):
    replace(folder / name, LFS)
    refused(folder, folder / name, "Git LFS pointer", "git lfs pull")


@pytest.mark.parametrize(
    "page",
    [
        b"<!DOCTYPE html><html><body>404</body></html>",
        b"\n  <html>",
        b"\xef\xbb\xbf<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    ],
)
@pytest.mark.parametrize("name", [UNET, "model_index.json"])
def test_a_web_page_saved_as_weights(folder, name, page):
    replace(folder / name, page)
    refused(folder, folder / name, "web page")


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt"])
@pytest.mark.parametrize("data", [LFS, b"<!doctype html>", b""])
def test_no_weights_in_a_single_file(tmp_path, name, data):
    replace(tmp_path / name, data)
    refused(tmp_path / name, tmp_path / name)


def test_nothing_there(tmp_path):
    refused(tmp_path / "x.safetensors", tmp_path / "x.safetensors", "not there")
    refused(tmp_path / "x", tmp_path / "x", "not there")


@pytest.mark.parametrize("name", [UNET, "model_index.json", "vae/config.json"])
def test_a_dangling_link(folder, name):
    (folder / name).unlink()
    (folder / name).symlink_to("../../blobs/0123")
    refused(folder, folder / name, "link", "not there")


@pytest.mark.parametrize("name", [UNET, "model_index.json"])
def test_a_looping_link(folder, name):
    (folder / name).unlink()
    (folder / name).symlink_to(os.path.basename(name))
    refused(folder, folder / name, "loop")


def test_a_name_that_is_too_long(tmp_path):
    refused(tmp_path / ("x" * 300), "cannot be read", "too long")
    refused("x" * 300 + ".safetensors", "cannot be read", "too long")


def test_a_folder_that_cannot_be_listed(folder, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(folder), "iterdir", refuse)
    refused(folder, f"{folder}/", "cannot be listed (Permission denied)")
    with pytest.raises(InputError, match="cannot be listed .Permission denied"):
        load_autoencoder(folder / "vae")


def test_a_looping_folder(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    refused(tmp_path / "a", tmp_path / "a", "loop")


def test_a_looping_component(folder):
    shutil.rmtree(folder / "unet")
    (folder / "unet").symlink_to("unet")
    refused(folder, folder / "unet")


def test_a_pipe_is_not_waited_for(folder):
    (folder / UNET).unlink()
    os.mkfifo(folder / UNET)
    refused(folder, folder / UNET, "not a regular file")


@pytest.mark.parametrize(
    "name, value",
    [
        ("unet", ["diffusers", "FluxTransformer2DModel"]),
        ("unet", ["os", "UNet2DConditionModel"]),
        ("unet", ["diffusers", ["UNet2DConditionModel"]]),
        ("vae", ["diffusers", "AutoencoderTiny"]),
        ("text_encoder", ["transformers", "T5EncoderModel"]),
        ("tokenizer", ["transformers", "T5Tokenizer"]),
        ("scheduler", ["evil_module", "DDIMScheduler"]),
        ("scheduler", ["diffusers", "FlowMatchEulerDiscreteScheduler"]),
        ("safety_checker", ["evil_module", "Checker"]),
        ("controlnet", ["diffusers", "ControlNetModel"]),
        ("image_encoder", ["os", "system"]),
        ("unet", {"_class_name": "UNet2DConditionModel"}),
        ("unet", ["diffusers"]),
    ],
)
def test_a_class_that_is_not_ours_is_never_imported(folder, name, value):
    import sys

    edit_json(folder / "model_index.json", **{name: value})
    refused(folder, folder / "model_index.json", f"'{name}'")
    assert "evil_module" not in sys.modules


@pytest.mark.parametrize("value", ["FluxPipeline", "StableDiffusion3Pipeline", None, 3, {}])
def test_a_pipeline_that_is_not_ours(folder, value):
    edit_json(folder / "model_index.json", _class_name=value)
    refused(folder, folder / "model_index.json", "_class_name")


def test_a_component_of_another_class_than_its_index_says(folder):
    edit_json(folder / "unet/config.json", _class_name="UNet3DConditionModel")
    refused(folder, folder / "unet/config.json", "UNet3DConditionModel")


@pytest.mark.parametrize("name", ["unet", "vae", "scheduler"])
def test_an_index_without_a_component(folder, name):
    index = json.loads((folder / "model_index.json").read_text())
    del index[name]
    replace(folder / "model_index.json", index)
    refused(folder, folder / "model_index.json", f"'{name}'")


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_component_that_is_not_there(folder, name):
    shutil.rmtree(folder / name)
    refused(folder, folder / name, "not there")


@pytest.mark.parametrize("name", ["unet", "text_encoder"])
def test_a_component_without_weights(folder, name):
    for file in (folder / name).glob("*.safetensors"):
        file.unlink()
    refused(folder, folder / name, "has no weights")


JSON = {
    "not JSON": b"{",
    "an array": b"[]",
    "not UTF-8": b'{"a": "\xff"}',
    "a key twice": b'{"a": 1, "a": 2}',
    "too deep": b'{"a":' + b"[" * 100_000,
    "too long": b'{"a": "' + b"x" * 5_000_000 + b'"}',
    "an endless number": b'{"a": ' + b"1" * 10_000 + b"}",
}


@pytest.mark.parametrize("fault", JSON)
@pytest.mark.parametrize(
    "name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"]
)
def test_a_config_that_is_no_config(folder, name, fault):
    replace(folder / name, JSON[fault])
    refused(folder, folder / name)


@pytest.mark.parametrize(
    "changes",
    [
        {"block_out_channels": [2**40, 2**40]},
        {"block_out_channels": [64000, 64000]},
        {"cross_attention_dim": 10**15},
        {"layers_per_block": 10**9},
        {"transformer_layers_per_block": 10**6},
        {"in_channels": -1},
        {"in_channels": "4"},
        {"block_out_channels": 3},
        {"down_block_types": ["EvilBlock"] * 2},
        {"norm_num_groups": 0},
        {"sample_size": 10**400},
    ],
)
def test_a_config_that_asks_for_petabytes_or_nonsense(folder, changes):
    edit_json(folder / "unet/config.json", **changes)
    refused(folder, folder / "unet/config.json", next(iter(changes)))


def test_a_config_of_another_network_allocates_nothing(folder):
    """Shapes are compared with the header before memory is taken: this one wants 30 GB."""
    edit_json(folder / "unet/config.json", block_out_channels=[8000, 16000])
    refused(folder, folder / UNET, "shape")


def test_parts_of_different_models(folder):
    edit_json(folder / "unet/config.json", cross_attention_dim=48)

    def widen(arrays):
        for key, array in arrays.items():
            if "attn2.to_k" in key or "attn2.to_v" in key:
                arrays[key] = np.ones((array.shape[0], 48), np.float32)

    change(folder / UNET, widen)
    refused(folder, "cross_attention_dim", "different models")


def test_a_text_encoder_without_its_tokenizer(folder):
    edit_json(folder / "model_index.json", tokenizer=[None, None])
    refused(folder, "has a text_encoder and no tokenizer: add it")


def test_a_tokenizer_that_knows_more_than_its_text_encoder_embeds(folder):
    path = folder / "tokenizer/tokenizer_config.json"
    edit_json(path, model_max_length=78)
    refused(folder, "max_position_embeddings of its text_encoder is 77", "78")
    tokens = json.loads(path.read_text())["added_tokens_decoder"]
    toy = {"49408": {"content": "<toy>"}}
    edit_json(path, model_max_length=77, added_tokens_decoder=tokens | toy)
    refused(folder, "vocab_size of its text_encoder is 49408", "49409 ids", "saved together")
    # A textual inversion has a row more, and its token is embedded.
    edit_json(folder / "text_encoder/config.json", vocab_size=49409)
    key = "text_model.embeddings.token_embedding.weight"
    change(folder / TEXT, lambda a: a.update({key: np.concatenate([a[key], a[key][:1]])}))
    model, _ = load(folder)
    assert model.tokenizer(["a <toy>"]).ids.max() == 49408


def shard(folder, weight_map):
    """Put the UNet's weights into two shards with this index."""
    arrays = {k: t.read().copy() for k, t in safetensors.open(folder / UNET).items()}
    (folder / UNET).unlink()
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    places = {key: names[i % 2] for i, key in enumerate(sorted(arrays))}
    for name in names:
        entries = [
            Entry(k, a.shape, a.dtype, lambda a=a: a)
            for k, a in arrays.items()
            if places[k] == name
        ]
        safetensors.write(folder / "unet" / name, entries)
    weight_map(places)
    index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    replace(index, {"metadata": {}, "weight_map": places})
    return index


def test_shards_are_good_without_a_fault(folder):
    shard(folder, lambda places: None)
    load(folder)


@pytest.mark.parametrize(
    "name",
    ["../../vae/diffusion_pytorch_model.safetensors", "/etc/passwd", "..", ".", "", "a/b", "a\\b"]
    + ["C:\\x.safetensors", 3, None, ["a"]],
)
def test_a_shard_path_that_leaves_the_folder(folder, name):
    index = shard(folder, lambda places: places.update({"conv_in.weight": name}))
    refused(folder, index, "'conv_in.weight'", "not the name of a file")


def test_a_shard_that_is_not_there(folder):
    index = shard(folder, lambda places: None)
    gone = index.parent / "diffusion_pytorch_model-00002-of-00002.safetensors"
    gone.unlink()
    refused(folder, gone, "not there")


def test_a_key_that_is_not_in_its_shard(folder):
    index = shard(folder, lambda places: places.update({"nothing": places["conv_in.weight"]}))
    refused(folder, index, "'nothing'", "lacks it")


def test_a_key_that_the_index_forgets(folder):
    shard(folder, lambda places: places.pop("conv_in.weight"))
    refused(folder, "conv_in.weight", "does not place there")


def test_shards_without_an_index(folder):
    shard(folder, lambda places: None).unlink()
    refused(folder, folder / "unet", "index")


@pytest.mark.parametrize("data", [b"{}", b'{"weight_map": []}', b'{"weight_map": {}}', b"{"])
def test_an_index_of_nothing(folder, data):
    index = shard(folder, lambda places: None)
    replace(index, data)
    refused(folder, index)


def test_a_component_instead_of_the_checkpoint(folder):
    refused(folder / "unet", folder / "unet", f"give the folder above, {folder}")


def test_a_folder_of_something_else(tmp_path):
    refused(tmp_path, tmp_path, "has no model_index.json")
    replace(tmp_path / "v1-5.ckpt", b"x")
    refused(tmp_path, tmp_path / "v1-5.ckpt")


def test_arguments_that_do_not_fit_the_path(folder):
    refused(folder, "config is for single files", config="sd1")
    refused(folder, "ema is for single files", ema=True)
    refused(folder, "'fp16'", variant="fp16")
    refused(folder / UNET, "variant is for folders", variant="fp16")


def test_a_mistyped_path_does_not_go_to_the_hub(monkeypatch, tmp_path):
    from huggingface_hub import HfApi

    def ask(self, name, timeout):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(HfApi, "model_info", ask)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ckpts").mkdir()
    for path in ("ckpts/x.safetensors", "ckpts/other", "nowhere/x.ckpt", "nowhere/X.CKPT"):
        refused(path, path, "is not there: check the path")


def test_a_hub_id_without_a_network(monkeypatch):
    from huggingface_hub import HfApi

    def offline(self, name, timeout):
        raise OSError("there is no network")

    monkeypatch.setattr(HfApi, "model_info", offline)
    refused("nobody/no-such-model-here", "nobody/no-such-model-here", "network")


def test_inspect_refuses_as_load_does(folder):
    change(folder / UNET, lambda arrays: arrays.pop("conv_in.weight"))
    with pytest.raises(InputError, match="conv_in.weight"):
        inspect(folder)


def test_a_malicious_pickle_in_a_folder_does_not_run(folder):
    import pickle
    import zipfile

    mark = folder / "ran"

    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {mark}",)

    (folder / UNET).unlink()
    path = folder / "unet/diffusion_pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({"conv_in.weight": Attack()}, 2))
    refused(folder, path, "system", "nothing in it ran")
    assert not mark.exists()


def test_a_duplicate_key_in_a_pickle(tmp_path):
    import zipfile

    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", b"\x80\x02}(X\x01\x00\x00\x00aK\x01X\x01\x00\x00\x00aK\x02u.")
    with pytest.raises(InputError, match="x.ckpt.*'a' twice"):
        pickles.open(path)
