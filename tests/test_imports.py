"""Importing sdjax costs what importing jax and flax costs."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors import numpy

import sdjax
from sdjax import bundled
from sdjax.checkpoints import safetensors

HEAVY = {
    "PIL",
    "diffusers",
    "huggingface_hub",
    "matplotlib",
    "optax",
    "orbax",
    "safetensors",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
}


# Names are imported when first used: use them all.
SDJAX = "import sdjax; [getattr(sdjax, name) for name in sdjax.__all__]"


def modules_after(statement: str) -> set[str]:
    """Every module that a fresh Python holds after one statement."""
    program = f"import sys, json; {statement}; print(json.dumps(list(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout))


def test_importing_sdjax_imports_little_more_than_jax_and_flax():
    base = modules_after("import jax, flax")
    ours = modules_after(SDJAX)
    assert len(ours) < 2 * len(base), f"{len(ours)} modules against {len(base)}"


def test_importing_sdjax_adds_no_heavy_library():
    # What flax itself drags in is flax's affair.
    added = modules_after(f"import jax, flax; {SDJAX}") - modules_after("import jax, flax")
    assert not {name.split(".")[0] for name in added} & HEAVY


def test_importing_sdjax_imports_no_torch():
    assert not modules_after(SDJAX) & {"torch", "transformers", "tokenizers", "PIL"}


def test_the_package_itself_waits_with_jax_until_a_name_is_used():
    assert "jax" not in modules_after("import sdjax, sdjax.cli")


COMMANDS = pytest.mark.parametrize(
    "command", ["inspect {}", "convert {} out", "generate cat --model {}"]
)


def assert_refused_before_jax(command, path, said, cwd):
    """A command on a path ends with code 2 and words of its sentence, and never imports jax."""
    main = f"from sdjax.cli.command import main; code = main({command.format(path).split()})"
    program = f"import sys; {main}; print(code, 'jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=cwd)
    assert done.stdout.split() == ["2", "False"] and said in done.stderr, done.stderr


@COMMANDS
def test_a_file_that_holds_no_weights_is_refused_before_jax_loads(command, tmp_path):
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    for name, said in (("pointer.safetensors", "Git LFS pointer"), ("gone", f"{tmp_path}/gone")):
        assert_refused_before_jax(command, tmp_path / name, said, tmp_path)


def changed(weights, change):
    """Change a file's dict of arrays, key to array."""
    tensors = {key: np.array(tensor.read()) for key, tensor in safetensors.open(weights).items()}
    change(tensors)
    numpy.save_file(tensors, weights)


@pytest.fixture(scope="module")
def misfits(tmp_path_factory):
    """Copies of the bundled model with one thing wrong, and what is said of each."""
    folder, key = tmp_path_factory.mktemp("misfits"), "conv_out.weight"
    changes = {
        "lacks": lambda arrays: arrays.pop(key),
        "'stray'": lambda arrays: arrays.update(stray=arrays[key]),
        "has shape": lambda arrays: arrays.update({key: arrays[key][1:].copy()}),
        "is int8": lambda arrays: arrays.update({key: arrays[key].astype(np.int8)}),
    }
    said = {}
    for number, (words, change) in enumerate(changes.items()):
        path = shutil.copytree(bundled.HOME, folder / str(number))
        changed(path / "unet" / "diffusion_pytorch_model.safetensors", change)
        said[str(path)] = words
    single = sdjax.save(folder / "single.safetensors", *sdjax.load())
    changed(single, lambda arrays: arrays.pop("model.diffusion_model.out.2.bias"))
    return said | {f"{single} --config scenes": "lacks the key 'model.diffusion_model.out.2.bias'"}


@COMMANDS
def test_weights_that_do_not_fit_are_refused_before_jax_loads(command, misfits, tmp_path):
    for path, said in misfits.items():
        assert_refused_before_jax(command, path, said, tmp_path)


def test_a_checkpoint_that_fits_is_found_without_jax():
    found = "from sdjax.checkpoints.finding import find; assert find('scenes').family"
    assert "jax" not in modules_after(found)


def test_modules_of_the_mathematics_come_when_named():
    program = (
        "import sdjax; config = dict(_class_name='DDIMScheduler'); "
        "print(len(sdjax.diffusion.profiles.diffusers(config, 5).timesteps), "
        "sdjax.diffusion.guidance.apg.__name__, 'samplers' in dir(sdjax.diffusion), "
        "hasattr(sdjax.diffusion, 'nothing'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["5", "apg", "True", "False"]
