"""Importing sdjax costs what importing jax and flax costs."""

import json
import subprocess
import sys

import pytest

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


@pytest.mark.parametrize("command", ["inspect {}", "convert {} out", "generate cat --model {}"])
def test_a_file_that_holds_no_weights_is_refused_before_jax_loads(command, tmp_path):
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    for name, said in (("pointer.safetensors", "Git LFS pointer"), ("gone", f"{tmp_path}/gone")):
        words = command.format(tmp_path / name).split()
        main = f"from sdjax.cli.command import main; code = main({words})"
        program = f"import sys; {main}; print(code, 'jax' in sys.modules)"
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.stdout.split() == ["2", "False"] and said in done.stderr


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
