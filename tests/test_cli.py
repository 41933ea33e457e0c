"""The command refuses in a sentence before it loads, and repeats what it made."""

import dataclasses
import json
import logging
import os
import queue
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import peers
import pytest

from sdjax import bundled, images
from sdjax.checkpoints import digest
from sdjax.cli import generate, main, request, show
from sdjax.cli.command import parser
from sdjax.errors import InputError

MODEL = ["--model", "."]
ROOT = str(images.Path(images.__file__).parent.parent)
# All runs here are of one size, so that each program is compiled once.
SMALL = ["--steps", "1", "--height", "32", "--width", "32"]
# As the fixture `first` has it, but for steps.
SAME = [*SMALL[2:], "--sampler=ddim", "--spacing=leading", "--noise=torch-cpu", "--no-cache"]


def command(*arguments, **environment):
    """The command in a process of its own, started."""
    return subprocess.Popen(
        [sys.executable, "-m", "sdjax", *arguments],
        env=os.environ | {"PYTHONPATH": ROOT} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests started in a shell's background ignore Ctrl-C, and would hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def refused(capsys, *arguments):
    """The one sentence that a command line is refused with."""
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sdjax: error: ") and err.count("\n") == 1
    return err.removeprefix("sdjax: error: ").rstrip()


@pytest.fixture(scope="module", autouse=True)
def jax_as_it_was():
    """The command sets jax's cache for its process: here that is everybody's."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    names = ["jax_enable_compilation_cache", "jax_compilation_cache_dir"]
    names += [f"jax_persistent_cache_min_{n}" for n in ("compile_time_secs", "entry_size_bytes")]
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--height", "500"], "height must be a multiple of 8, got 500: try 496 or 504"),
        (["--width", "7"], "width must be a multiple of 8, got 7: try 8"),
        (["--width", "0"], "width must be a whole number from 1 to 65536, got 0"),
        (["--steps", "0"], "steps must be a whole number from 1 to 1000, got 0"),
        (["--steps", "1001"], "steps must be a whole number from 1 to 1000, got 1001"),
        (["--steps", "2.5"], "steps must be a whole number from 1 to 1000, got 2.5"),
        (["--steps", "9" * 5000], "steps must be a whole number"),
        (["--lora", "nowhere:0.5"], "there is no LoRA at nowhere: check --lora"),
        (["--lora", "nowhere:else"], "there is no LoRA at nowhere:else: check --lora"),
        (
            ["--lora", "file:nan"],
            "the scale of a LoRA must be a finite number such as 0.8, got nan",
        ),
        (["--lora", "file:1e39"], "must be a finite number such as 0.8, got 1e39"),
        (["--lora", "file:lots"], "must be a finite number such as 0.8, got lots"),
        (["--guidance", "nan"], "guidance must be a finite number such as 7.5, got nan"),
        (["--guidance=-inf"], "guidance must be a finite number such as 7.5, got -inf"),
        (["--guidance", "1e39"], "guidance must be a finite number such as 7.5, got 1e39"),
        (["--guidance", "7,5"], "guidance must be a finite number such as 7.5, got '7,5'"),
        (["--seed", "-1"], "seed must be a whole number from 0 to 2**64 - 1, got -1"),
        (["--seed", str(2**64)], "got 18446744073709551616"),
        (["--seed", str(2**64 - 2), "--count", "3"], "pass the last seed, 2**64 - 1"),
        (["--count", "0"], "count must be a whole number from 1 to 1000000, got 0"),
        (["--batch", "0"], "batch must be a whole number from 1 to 65536, got 0"),
        (["--guidance-method", "apgg"], "unknown guidance method apgg: try apg"),
        (["--sampler", "eulr"], "unknown sampler eulr: try euler"),
        (["--sampler", "Euler a"], "unknown sampler 'Euler a': try euler_ancestral"),
        (["--sampler", "DPM++ 2M"], "unknown sampler 'DPM++ 2M': try dpmpp_2m"),
        (["--sampler", "zzz"], "unknown sampler zzz: there are euler, "),
        (["--spacing", "karas"], "unknown spacing karas: try karras"),
        (["--dtype", "fp16"], "unknown dtype fp16: try float16"),
        (["--dtype", "int8"], "unknown dtype int8: there are float32"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--stepps", "3"], "unrecognized arguments: --stepps"),
        (["--ste", "3"], "unrecognized arguments: --ste"),
        (["--out", "file/images"], "no image can be written to file/images: Not a directory"),
        (["--out", "file"], "no image can be written to file: Not a directory"),
        (["--out", "long" * 75], ": File name too long"),
        (["--out", "a.png", "--count", "2"], "a.png is one file, for 2 images"),
        (["--out", "there.png"], "there.png is there already"),
        (["--out", "a\0b"], "is no path"),
        (["--prompts", "file"], "prompts were given both on the command line and by --prompts"),
        (["--model", "nowhere"], "there is no model at nowhere: check --model"),
        (["--model", "a/b/c"], "there is no model at a/b/c"),
        (["--model", "file"], "file"),
        (["--from", "file"], "file is not a PNG"),
        (["--from", ""], "'' cannot be read (No such file"),
        (["--from", "there.png"], "there.png holds no settings of sdjax"),
        (["--negative", "a\udcffb"], "the negative 'a\\udcffb' is not valid Unicode"),
    ],
)
def test_generate_refuses_what_cannot_work(tmp_path, capsys, arguments, sentence):
    (tmp_path / "file").write_text("")
    images.save(tmp_path, "there", np.zeros((8, 8, 3), np.uint8))
    model = [] if "--model" in arguments else MODEL
    assert sentence in refused(capsys, "generate", "a cat", "--seed=1", *model, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there.png"]


def test_generate_needs_a_prompt(tmp_path, capsys):
    assert "no prompt was given" in refused(capsys, "generate", *MODEL)
    assert "not valid Unicode" in refused(capsys, "generate", "a\udcff", *MODEL)
    (tmp_path / "prompts.txt").write_bytes(b"fine\ncaf\xe9\n")
    assert "prompts.txt, line 2: byte 4" in refused(capsys, "generate", "--prompts", "prompts.txt")
    (tmp_path / "prompts.txt").write_bytes(b"\n")
    assert "holds no prompts" in refused(capsys, "generate", "--prompts", "prompts.txt")


def test_without_the_bundled_model_a_sentence_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bundled, "HOME", tmp_path / "assets")
    (tmp_path / "scenes").mkdir()  # a folder of one's own, which is ./scenes
    assert "(--model PATH)" in refused(capsys, "generate", "a cat")
    for asked in (["inspect"], ["convert", "--dtype=float32"], ["generate", "x", "--model"]):
        new = ["new"] if "convert" in asked else []
        sentence = refused(capsys, *asked, "scenes", *new)
        assert sentence.startswith(
            f"the bundled model, scenes, is not in this copy of sdjax ({tmp_path}"
        )
    assert "model_index.json" in refused(capsys, "inspect", "./scenes")


def test_other_commands_refuse_in_a_sentence_too(tmp_path, capsys):
    (tmp_path / "there").write_text("x")
    assert "nowhere" in refused(capsys, "inspect", "nowhere")
    assert "there" in refused(capsys, "inspect", "there")
    assert "there already" in refused(capsys, "convert", "nowhere", "there")
    assert "what is to be converted" in refused(capsys, "convert", "there", "there", "--overwrite")
    assert "not a folder" in refused(capsys, "convert", "there", "no/where")
    assert "unknown dtype" in refused(capsys, "convert", "there", "new", "--dtype", "int4")
    assert "invalid choice: 'nope'" in refused(capsys, "nope")


@pytest.mark.parametrize(
    ("failure", "sentence"),
    [
        (OSError(28, "No space left on device", "a.png"), "a.png: No space left on device"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (OSError("lost\nits way"), "lost"),
        (MemoryError(), "there is not enough memory (MemoryError): make less at once"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nby a buffer"),
            "there is not enough memory (RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes): ",
        ),
    ],
)
def test_what_the_system_refuses_is_said_in_a_sentence(capsys, monkeypatch, failure, sentence):
    import jax

    if type(failure) is RuntimeError:
        failure = jax.errors.JaxRuntimeError(str(failure))

    def fail(asked):
        raise failure

    monkeypatch.setattr(generate, "run", fail)
    assert refused(capsys, "generate", "a cat").startswith(sentence)


def test_what_is_wrong_in_sdjax_itself_is_no_sentence(monkeypatch):
    def fail(asked):
        raise RuntimeError("INTERNAL: who knows")

    monkeypatch.setattr(generate, "run", fail)
    with pytest.raises(RuntimeError, match="who knows"):
        main(["generate", "a cat"])


def test_help_and_version_are_results(capsys):
    from sdjax import __version__

    assert main(["--version"]) == 0 and main([]) == 0
    assert capsys.readouterr().out.startswith(f"sdjax {__version__}\nusage: sdjax")
    with pytest.raises(SystemExit) as done:
        main(["generate", "--help"])
    assert done.value.code == 0


def test_names_are_those_of_the_library():
    from sdjax.diffusion import methods, profiles

    assert set(request.SAMPLERS) == set(profiles.SAMPLERS)
    assert set(request.SPACINGS) == set(profiles.SPACINGS)
    assert set(request.GUIDANCE) == set(methods.METHODS)


def settings_of(path):
    return images.read_settings(path)


def paths(capsys):
    return [images.Path(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    import tiny

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.save_sd1(folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(
        json.dumps(tiny.SCHEDULER | {"_class_name": "DDPMScheduler", "variance_type": "learned"})
    )
    return folder


@pytest.fixture
def bundle(model, tmp_path, monkeypatch):
    """The tiny model in the bundled one's place, stored as that one is, with advice of its own."""
    import sdjax

    monkeypatch.setattr(bundled, "HOME", tmp_path / "package" / "scenes")
    bundled.HOME.parent.mkdir()
    loaded, params = sdjax.load(model)
    loaded = dataclasses.replace(loaded, steps=1, guidance_scale=3.0)
    return sdjax.save(bundled.HOME, loaded, params, dtype="float16")


@pytest.fixture(scope="module")
def first(model, tmp_path_factory):
    """One run: two prompts, two seeds, everything set; its programs are kept in `cache`."""
    out = tmp_path_factory.mktemp("first")
    asked = ["generate", "a red/house", "\N{CAT}", "--model", str(model), "--seed", "7", *SMALL]
    asked += ["--count", "2", "--sampler", "ddim", "--spacing", "leading", "--negative", "blurry"]
    asked += ["--guidance", "5", "--out", str(out / "images"), "--cache-dir", str(out / "cache")]
    asked += ["--noise", "torch-cpu"]
    jax.config.update("jax_enable_compilation_cache", True)  # --no-cache in an earlier test stays
    assert main(asked) == 0
    return out / "images"


def test_images_are_named_by_prompt_and_seed_and_carry_their_settings(first, model):
    names = ["a-red-house-7", "a-red-house-8", "contact-sheet", "image-7", "image-8"]
    assert sorted(path.stem for path in first.iterdir()) == names
    assert images.read(first / "image-8.png").shape == (32, 32, 3)
    settings = settings_of(first / "image-8.png")
    wanted = {"prompt": "\N{CAT}", "seed": 8, "steps": 1, "negative_prompt": "blurry"}
    wanted |= {"guidance_scale": 5.0, "width": 32, "height": 32, "sampler": "ddim"}
    wanted |= {"spacing": "leading", "model": request.from_home(str(model)), "dtype": "float32"}
    wanted |= {"noise": "torch-cpu"}
    assert {key: settings[key] for key in wanted} == wanted


def test_scenes_is_the_bundled_model_whatever_lies_here(bundle, model, tmp_path, capsys):
    import jax
    import tiny

    import sdjax
    from sdjax.model import compute_dtype

    (tmp_path / "scenes").mkdir()
    (loaded, params), (there, same) = sdjax.load(), sdjax.load(bundle)
    assert loaded == there and tiny.equal(params, same)
    assert {p.dtype.name for p in jax.tree.leaves(params)} == {"float16"}
    assert compute_dtype(params["unet"]) == np.float32
    with pytest.raises(InputError, match="model_index.json"):
        sdjax.load(images.Path("scenes"))
    assert main(["inspect", "scenes"]) == 0
    assert str(bundle) in capsys.readouterr().out
    sentence = refused(capsys, "convert", "scenes", str(bundle), "--overwrite")
    assert "is what is to be converted" in sentence


def test_without_a_model_the_bundled_one_is_used_as_it_advises(bundle, tmp_path, capsys):
    (tmp_path / "scenes").mkdir()
    assert main(["generate", "a cat", "--seed", "1", *SAME, "--out", "a.png"]) == 0
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if "--model" in line]
    assert said == [f"sdjax: scenes is {bundled.ABOUT}: for a real checkpoint add --model PATH"]
    settings = settings_of("a.png")
    wanted = {"steps": 1, "guidance_scale": 3.0, "dtype": "float32", "batch": 1}
    wanted |= {"model": "scenes", "model_name": "scenes"}
    assert {key: settings[key] for key in wanted} == wanted
    assert main(["generate", "--from", "a.png", "--no-cache", "--out", "b.png"]) == 0
    assert "--model" not in capsys.readouterr().err
    np.testing.assert_array_equal(images.read("b.png"), images.read("a.png"))
    assert settings_of("b.png") == settings
    # Named by its place, it is still known: by the place here, by its weights' hash elsewhere.
    again = ["generate", "--from", "a.png", "--no-cache", "--model", str(bundle), "--out", "c.png"]
    assert main(again) == 0 and settings_of("c.png") == settings
    images.save(tmp_path, "d", images.read("a.png"), settings | {"model": "/elsewhere/scenes"})
    assert request.read(parser().parse_args(["generate", "--from", "d.png"])).model == "scenes"


def test_what_a_model_advises_is_kept_and_torch_passes_it_over(bundle, caplog, monkeypatch):
    from diffusers import StableDiffusionPipeline

    import sdjax
    from sdjax import config
    from sdjax.checkpoints.folder import ADVICE, INDEX
    from sdjax.checkpoints.loading import advised

    loaded, _ = sdjax.load(bundle)
    assert loaded.guidance_scale == 3.0
    index = json.loads((bundle / INDEX).read_text())
    assert index[ADVICE] == {"steps": 1, "guidance_scale": 3.0}
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    StableDiffusionPipeline.from_pretrained(bundle)
    warned = [r for r in caplog.records if r.levelname == "WARNING"]
    assert [r.getMessage() for r in warned if r.name.startswith("diffusers")] == []
    assert advised({}, "") == {"steps": 20, "guidance_scale": 7.5}
    assert advised(config.read("scenes")["model_index"], "")["guidance_scale"] == 1.75
    for advice, sentence in (({"steps": 1001}, "1001"), ({"guidance_scale": np.inf}, "inf")):
        with pytest.raises(InputError, match=f"got {sentence}"):
            sdjax.text_to_image(dataclasses.replace(loaded, **advice), {}, "a cat")
    for bad in ({"steps": 0}, {"guidance_scale": "much"}, {"guidance_scale": float("inf")}):
        with pytest.raises(InputError, match="'_sdjax' must have steps from 1 to 1000"):
            advised({ADVICE: bad}, "there")


def test_loras_make_the_weights_that_diffusers_fuses(tmp_path, capsys, monkeypatch):
    import jax
    import test_lora
    import trainers

    import sdjax
    from sdjax.checkpoints.lora import save_lora
    from sdjax.tasks import text_to_image as task
    from sdjax.training.lora import Lora

    pipe, model, params = trainers.pipeline()
    sdjax.save(tmp_path / "model", model, params)
    lora, tree = test_lora.some_lora(model)
    save_lora(tmp_path / "ink", model, tree, lora.scale)
    targets = ("to_q", "to_out.0", "proj_in", "q_proj")
    _, other = test_lora.some_lora(model, Lora(rank=2, alpha=1.0, targets=targets), seed=6)
    other = {"unet": other["unet"]}  # diffusers forgets an encoder's first LoRA at its second
    test_lora.kohya_file(tmp_path / "paint:2.safetensors", model, other, 1.0, False)
    pipe.load_lora_weights(tmp_path / "ink", adapter_name="ink")
    pipe.load_lora_weights(tmp_path / "paint:2.safetensors", adapter_name="paint")
    pipe.set_adapters(["ink", "paint"], [1.0, 0.5])
    pipe.fuse_lora(components=list(tree), adapter_names=["ink", "paint"])
    pipe.unload_lora_weights()

    used = []

    def made(model, params, prompts, *, height, width, **_):
        used.append(jax.tree.map(np.asarray, params))
        return np.zeros((len(prompts), height, width, 3), np.uint8)

    monkeypatch.setattr(task, "text_to_image", made)
    run = ["generate", "a cat", "--seed=1", "--model=model", "--no-cache", *SMALL]
    assert main([*run, "--lora=ink", "--lora=paint:2.safetensors:0.5", "--out=a.png"]) == 0
    for name in tree:
        fused = peers.flax_params(getattr(pipe, name))
        assert trainers.distance(used[0][name], fused) < 1e-6
        assert trainers.distance(params[name], fused) > 1e-3
    settings = settings_of("a.png")
    assert [(s["name"], s["scale"]) for s in settings["loras"]] == [("ink", 1.0), ("paint:2", 0.5)]
    repeat = ["generate", "--from=a.png", "--no-cache", "--out=b.png"]
    assert main(repeat) == 0 and settings_of("b.png") == settings
    assert trainers.distance(used[1]["unet"], used[0]["unet"]) == 0

    repeat[-1] = "--out=c.png"
    save_lora(tmp_path / "ink", model, tree, 2 * lora.scale)
    capsys.readouterr()
    assert "is not the image's" in refused(capsys, *repeat)
    (tmp_path / "ink").rename(tmp_path / "blot")
    assert "with which a.png was made: give --lora" in refused(capsys, *repeat)
    wider = some_file_of_another_model(tmp_path)
    assert "use the model that it was trained for" in refused(capsys, *repeat, f"--lora={wider}")


def some_file_of_another_model(folder):
    from safetensors.numpy import save_file

    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    halves = {"A": np.ones((2, 320), np.float32), "B": np.ones((320, 2), np.float32)}
    save_file({f"{name}.lora_{h}.weight": v for h, v in halves.items()}, folder / "w.safetensors")
    return folder / "w.safetensors"


def test_a_method_of_guidance_is_passed_on_told_and_repeated(model, capsys, monkeypatch):
    from sdjax.tasks import text_to_image as task

    asked = []

    def made(model, params, prompts, *, guidance, guidance_scale, height, width, **_):
        asked.append((guidance, guidance_scale))
        return np.zeros((len(prompts), height, width, 3), np.uint8)

    monkeypatch.setattr(task, "text_to_image", made)
    run = ["generate", "a cat", "--seed=1", "--no-cache", *SMALL, "--guidance-method=cfg_plus_plus"]
    both = run[:-1] + ["--sampler=euler_cfg_pp", "--guidance-method=apg"]
    assert refused(capsys, *both).startswith("euler_cfg_pp is euler under CFG++")
    sentence = refused(capsys, *run, f"--model={model}", "--guidance=7.5")
    assert sentence.startswith("guidance_scale must be from 0 to 1") and "got 7.5" in sentence
    assert main([*run, f"--model={model}", "--out=a.png"]) == 0
    assert settings_of("a.png")["guidance_method"] == "cfg_plus_plus"
    assert main(["generate", "--from=a.png", "--no-cache", "--out=b.png"]) == 0
    assert asked == [("cfg_plus_plus", 0.6)] * 2 and settings_of("b.png") == settings_of("a.png")
    run[-1] = "--sampler=euler_cfg_pp"
    assert main([*run, f"--model={model}", "--out=c.png"]) == 0 and asked[2] == asked[0]
    assert settings_of("c.png")["sampler"] == "euler"
    # A scale of one kind of guidance is no scale of the other.
    again = ["generate", "--no-cache"]
    assert main([*again, "--from=c.png", "--guidance-method=cfg", "--out=d.png"]) == 0
    assert asked[3] == ("cfg", 7.5)
    assert main([*again, "--from=d.png", "--sampler=ddim_cfg_pp", "--out=e.png"]) == 0
    assert asked[4] == ("cfg_plus_plus", 0.6)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"in_channels": 7, "num_class_embeds": 20}, "cannot make pictures from text alone"),
        ({"time_cond_proj_dim": 8}, "is told the guidance scale (time_cond_proj_dim)"),
        ({"sample_size": 3}, "height must be a multiple of 8, got 6: try 8"),
    ],
)
def test_a_unet_that_cannot_be_sampled_is_refused_before_its_weights_are_read(
    tmp_path, capsys, monkeypatch, changes, sentence
):
    import tiny

    import sdjax
    from sdjax.models.unet import UNet

    loaded, params = tiny.sd1()
    loaded = dataclasses.replace(loaded, unet=UNet.from_config(tiny.UNET | changes))
    with pytest.raises(InputError) as raised:
        sdjax.text_to_image(loaded, {}, "a cat")
    assert sentence in str(raised.value)
    sdjax.save(tmp_path / "new", loaded, params | {"unet": tiny.random_params(loaded.unet)})
    monkeypatch.setattr(digest, "of_files", None)
    assert sentence in refused(capsys, "generate", "a cat", "--seed=1", "--model=new")


def test_guidance_that_float32_does_not_hold_is_refused(model):
    import sdjax

    loaded, params = sdjax.load(model)
    for scale in (1e39, -1e39, 10**400):
        with pytest.raises(InputError, match="guidance_scale must be finite in float32"):
            sdjax.text_to_image(loaded, params, "a cat", guidance_scale=scale)


def test_a_scheduler_with_numbers_that_json_lacks_is_told_and_repeated(
    model, tmp_path, capsys, monkeypatch
):
    """As diffusers saves DPM-Solver++: its lambda_min_clipped is -Infinity."""
    from diffusers import DPMSolverMultistepScheduler
    from PIL import Image

    import sdjax
    from sdjax.tasks import text_to_image as task

    def made(model, params, prompts, *, height, width, **_):
        return np.zeros((len(prompts), height, width, 3), np.uint8)

    monkeypatch.setattr(task, "text_to_image", made)
    shutil.copytree(model, "dpm")
    DPMSolverMultistepScheduler().save_pretrained("dpm/scheduler")
    path = tmp_path / "dpm" / "scheduler" / "scheduler_config.json"
    assert "-Infinity" in path.read_text()
    run = ["generate", "a cat", "--seed=1", "--no-cache", *SMALL]
    assert main([*run, "--model=dpm", "--out=a.png"]) == 0
    with Image.open("a.png") as image:  # by the letter of JSON
        settings = json.loads(image.text["sdjax"], parse_constant=pytest.fail)
    assert settings["scheduler"]["lambda_min_clipped"] == "-Infinity"
    again = ["generate", "--from=a.png", "--no-cache"]
    assert main([*again, "--out=b.png"]) == 0 and settings_of("b.png") == settings
    assert main(["inspect", "dpm", "--json"]) == 0 and main(["convert", "dpm", "new"]) == 0
    assert sdjax.load("new")[0].scheduler == sdjax.load("dpm")[0].scheduler
    capsys.readouterr()
    path.write_text(path.read_text().replace("-Infinity", "-5.1"))
    assert "the scheduler's config in" in refused(capsys, *again)


def test_a_long_hashing_is_explained(model, capsys, monkeypatch):
    said = queue.Queue()

    def hashing(paths):
        raise InputError(said.get(timeout=60))

    monkeypatch.setattr(show, "_PATIENCE", 0)
    monkeypatch.setattr(show, "note", said.put)
    monkeypatch.setattr(digest, "of_files", hashing)
    run = ["generate", "a cat", "--seed=1", "--sampler=ddim", "--spacing=leading"]
    assert refused(capsys, *run, f"--model={model}") == "hashing 0.01 GB"


def test_the_hash_is_the_one_that_inspect_says(first, model, capsys):
    assert main(["inspect", str(model), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert settings_of(first / "image-8.png")["model_hash"] == report["sha256"]
    assert report["family"] == "sd1" and report["prediction"] == "epsilon"


def test_from_repeats_an_image_bit_by_bit(first, capsys):
    original = first / "image-8.png"
    assert main(["generate", "--from", str(original), "--no-cache", "--out", "again.png"]) == 0
    assert paths(capsys) == [images.Path("again.png")]
    np.testing.assert_array_equal(images.read("again.png"), images.read(original))
    assert settings_of("again.png") == settings_of(original)


def test_from_refuses_other_weights_unless_they_are_named(first, tmp_path, capsys):
    changed = settings_of(first / "image-8.png") | {"model_hash": "0" * 64}
    path = images.save(tmp_path, "changed", images.read(first / "image-8.png"), changed)
    run = ["generate", "--from", str(path), "--no-cache", "--out", "new.png"]
    sentence = refused(capsys, *run)
    assert "(0000000000)" in sentence and "give --model" in sentence
    assert main([*run, "--model", changed["model"], "--seed", "7"]) == 0
    assert "warning: the weights of" in capsys.readouterr().err
    np.testing.assert_array_equal(images.read("new.png"), images.read(first / "image-7.png"))
    huge = images.save(tmp_path, "huge", images.read(path), changed | {"guidance_scale": 10**400})
    assert "must be a finite number" in refused(capsys, "generate", "--from", str(huge))
    gone = changed | {"model": str(tmp_path / "gone")}
    path = images.save(tmp_path, "gone", images.read(path), gone)
    assert "there is no model at" in refused(capsys, "generate", "--from", str(path))


def test_another_process_repeats_an_image_bit_by_bit(first, tmp_path):
    assert list((first.parent / "cache").glob("*-cache"))
    asked = ["generate", "--from", str(first / "image-8.png"), "--out", "again.png"]
    run = command(*asked, "--cache-dir", str(first.parent / "cache"))
    out, err = run.communicate()
    assert run.returncode == 0 and out == "again.png\n", err
    np.testing.assert_array_equal(images.read("again.png"), images.read(first / "image-8.png"))


def test_a_prompt_file_gives_an_image_a_line(first, model, tmp_path, capsys):
    long = "word " * 75 + "the  End"
    (tmp_path / "prompts.txt").write_text(f"\ufeffone\r\n\r\n{long}\r\n", newline="")
    asked = ["generate", "--prompts", "prompts.txt", "--model", str(model), "--seed", "3", *SMALL]
    assert main([*asked, "--no-cache"]) == 0
    out, err = capsys.readouterr()
    made = [images.Path(line).name for line in out.splitlines()]
    assert made == ["one-3.png", images.safe_name(long, 3) + ".png", "contact-sheet.png"]
    assert settings_of(f"images/{made[0]}")["guidance_scale"] == 7.5
    assert err.count("cut: 'the  End'") == 1 and "is over 77 tokens" in err
    assert "variance_type" in err


def test_a_home_that_is_read_only_keeps_no_programs(tmp_path, monkeypatch, capsys):
    import jax

    from sdjax.checkpoints import digest
    from sdjax.cli import command, generate

    kept = jax.config.jax_compilation_cache_dir
    (tmp_path / "blocked").write_text("")  # a file where a folder should be stops root too
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "blocked"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    asked = ["generate", "a cat"]
    generate.keep_programs(command.parser().parse_args(asked))
    assert jax.config.jax_compilation_cache_dir == kept
    with pytest.raises(InputError, match="no cache can be kept in blocked/x"):
        generate.keep_programs(command.parser().parse_args([*asked, "--cache-dir", "blocked/x"]))
    (tmp_path / "weights").write_bytes(b"abc")
    assert digest.sha256("weights").startswith("ba7816bf")


def test_a_remembered_hash_is_forgotten_when_the_file_changes(tmp_path):
    from sdjax.checkpoints import digest

    path = tmp_path / "weights"
    path.write_bytes(b"abc")
    assert digest.sha256(path) == digest.sha256(path) == digest.of_files([path, path])
    assert digest.sha256(path).startswith("ba7816bf")
    path.write_bytes(b"abd")
    assert digest.sha256(path).startswith("a52d159f")
    (digest.home() / "sha256.json").write_text("{")
    assert digest.sha256(path).startswith("a52d159f")


def test_interrupted_it_says_what_was_saved(model, monkeypatch, capsys):
    """By then the weights are on all devices, once for all batches, and the image names nobody."""
    import jax
    from jax.sharding import NamedSharding

    from sdjax.cli import command, generate

    def stopped(wanted, model, params, progress):
        assert all(isinstance(p.sharding, NamedSharding) for p in jax.tree.leaves(params))
        yield generate.Job("a cat", 1), np.zeros((8, 8, 3), np.uint8)
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "made", stopped)
    monkeypatch.setenv("HOME", str(model.parent))
    asked = ["generate", "a cat", "--count", "3", "--seed", "1", "--model", str(model)]
    assert main([*asked, "--no-cache"]) == 130
    assert "stopped: 1 of 3 images were saved in images" in capsys.readouterr().err
    assert settings_of("images/a-cat-1.png")["model"] == "~/tiny"
    asked = command.parser().parse_args(["generate", "--from", "images/a-cat-1.png"])
    assert request.read(asked).model == str(model)


def test_paths_under_home_are_told_from_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "anna"))
    for path, told in (("anna/models/x", "~/models/x"), ("annabel/x", None), ("x", None)):
        path = str(tmp_path / path)
        assert request.from_home(path) == (told or path)
        assert request.near_home(request.from_home(path)) == path
    assert request.from_home("x") == str(tmp_path / "x")  # whatever the folder it is asked from


def test_float16_is_computed_in_bfloat16_off_the_cpu(capsys):
    from sdjax.checkpoints.finding import find
    from sdjax.cli import generate

    def chosen(stored, cpu):
        source = find("scenes")
        tensors = source.networks["unet"].tensors
        for key, tensor in tensors.items():
            tensors[key] = dataclasses.replace(tensor, dtype=np.dtype(stored))
        return generate.default_dtype(source, cpu)

    assert chosen("float16", True) == "float32" and chosen("float32", False) is None
    assert capsys.readouterr().err == ""
    assert chosen("float16", False) == "bfloat16"
    assert "bfloat16 is used" in capsys.readouterr().err


def test_ctrl_c_ends_with_130_and_no_traceback(model):
    run = command("generate", "a cat", "--model", str(model), "--seed", "1", "--no-cache")
    for line in run.stderr:
        if "loading" in line:
            break
    run.send_signal(signal.SIGINT)
    _, rest = run.communicate()
    assert run.returncode == 130
    assert "Traceback" not in rest and "stopped: 0 of 1 images were saved" in rest


def test_a_reader_that_leaves_does_not_stop_the_work():
    code = "from sdjax.cli.show import say, note; say('one'); say('two'); note('done')"
    read, write = os.pipe()
    os.close(read)
    run = [sys.executable, "-c", code]
    here = os.environ | {"PYTHONPATH": ROOT}
    done = subprocess.run(run, stdout=write, stderr=subprocess.PIPE, text=True, env=here)
    os.close(write)
    assert done.returncode == 0 and done.stderr == "sdjax: done\n"


def test_convert_writes_what_inspect_reads(model, tmp_path, capsys):
    assert main(["convert", str(model), "half.safetensors", "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out == "half.safetensors\n"
    assert "there already" in refused(capsys, "convert", str(model), "half.safetensors")
