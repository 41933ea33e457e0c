"""`sdjax train` refuses in a sentence before jax, loses nothing, and prints what it saved."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from sdjax import errors
from sdjax.cli import main
from sdjax.errors import InputError
from sdjax.training import folder, settings

OWN = """
kind = "second_stage"
[run]
steps = 100
batch_size = 8
[model]
config = "sd1"
vae = "vae"
[data]
source = "scenes"
height = 128
width = 128
"""
ROOT = str(Path(errors.__file__).parent.parent)


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.toml").write_text(OWN)
    (tmp_path / "vae").mkdir()


@pytest.fixture
def trained(monkeypatch):
    """What the command asks of the loop, which here does nothing but remember."""
    asked = []

    def train(run, *, note, resume):
        asked.append((run, resume))
        note("saved step 100")
        return Path(run.run.out) / "model"

    loop = types.ModuleType("sdjax.training.loop")
    loop.train = train
    monkeypatch.setitem(sys.modules, "sdjax.training.loop", loop)
    # It sets jax's cache for its process: here that is everybody's.
    monkeypatch.setattr("sdjax.cli.train.keep_programs", lambda asked: None)
    return asked


def refused(capsys, *arguments):
    """The one sentence that a command line is refused with."""
    assert main(["train", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("sdjax: error: ") and err.count("\n") == 1
    return err.removeprefix("sdjax: error: ").rstrip()


def saved(out, *steps):
    """A run's folder with checkpoints, as far as names tell."""
    run = settings.read("own.toml", [f"run.out={out}"])
    folder.prepare(run)
    for step in steps:
        (Path(out) / folder.CHECKPOINTS / str(step)).mkdir(parents=True)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "the following arguments are required: CONFIG (`sdjax train --help` says"),
        (["nowhere.toml"], "there are no settings at nowhere.toml: "),
        (
            ["own.toml", "--set", "run.stepz=3"],
            "--set: there is no setting run.stepz: did you mean",
        ),
        (["own.toml", "--set"], "argument --set: expected one argument"),
        (["own.toml", "run.steps=3"], "unrecognized arguments: run.steps=3"),
        (["own.toml", "--set", "run.steps=0"], "run.steps must be a whole number of at least 1"),
        (["own.toml", "--set", "model.vae=a/b/c"], "model.vae: there is no model at a/b/c"),
        (["own.toml", "--set", "data.source=imgs"], "data.source: there is nothing at imgs"),
        (["own.toml", "--fresh", "--resume"], "--fresh and --resume are both given: take one"),
        (["own.toml", "--resume"], "there is no checkpoint in runs/own to go on from"),
        (
            ["own.toml", "--set", "run.out=own.toml"],
            "run.out own.toml is a file: give another name",
        ),
        (["own.toml", "--set", "run.out=own.toml/x"], "cannot be written: Not a directory"),
        (["own.toml", "--set", "run.out=full"], "run.out full is not empty and holds no run"),
        (
            ["own.toml", "--set", "run.out=gs://a/b"],
            "run.out gs://a/b is no folder of this machine",
        ),
    ],
)
def test_train_refuses_what_cannot_work(tmp_path, capsys, trained, arguments, sentence):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert sentence in refused(capsys, *arguments)
    assert sorted(tmp_path.rglob("*")) == before and trained == []


def test_train_trains_and_prints_the_path(capsys, trained):
    assert main(["train", "own.toml", "--set", "run.steps=7", "--set=model.dtype=bfloat16"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("runs/own/model\n", "sdjax: saved step 100\n")
    ((run, resume),) = trained
    assert (run.run.steps, run.model.dtype, resume) == (7, "bfloat16", True)
    assert settings.read("runs/own/settings.toml") == run


def test_a_run_that_is_there_is_gone_on_with_or_kept(tmp_path, capsys, trained):
    saved("runs/own", 50, 100)
    before = (tmp_path / "runs/own/settings.toml").read_bytes()
    sentence = refused(capsys, "own.toml", "--set", "optimizer.clip=3")
    assert "runs/own holds a run with other settings: optimizer.clip (1.0, now 3.0)" in sentence
    sentence = refused(capsys, "own.toml", "--fresh")
    assert sentence == (
        "run.out runs/own holds a run that is saved up to step 100: to begin anew give run.out "
        "another folder, or remove this one"
    )
    assert (tmp_path / "runs/own/settings.toml").read_bytes() == before and trained == []
    assert main(["train", "own.toml", "--resume", "--set", "run.steps=200"]) == 0
    assert settings.read("runs/own/settings.toml").run.steps == 200
    assert [path.name for path in (tmp_path / "runs/own").glob(".*")] == []


def test_a_folder_without_checkpoints_has_nothing_to_lose(capsys, trained):
    saved("runs/own")
    assert main(["train", "own.toml", "--fresh", "--set", "optimizer.clip=3"]) == 0
    assert settings.read("runs/own/settings.toml").optimizer.clip == 3
    assert trained[0][1] is False


def test_settings_saved_before_a_key_was_known_are_as_its_default(tmp_path):
    saved("runs/own", 50)
    path = tmp_path / "runs/own/settings.toml"
    path.write_text(path.read_text().replace("clip = 1.0\n", ""))
    folder.prepare(settings.read("own.toml"))
    path.write_text(path.read_text() + "[later]\nx = 1\n")
    with pytest.raises(InputError, match=r"other settings: later.x \(1, now absent\)"):
        folder.prepare(settings.read("own.toml"))
    path.write_text("= broken")
    with pytest.raises(InputError, match="settings.toml cannot be read"):
        folder.prepare(settings.read("own.toml"))


def test_settings_are_shown_as_toml(tmp_path, capsys, trained):
    assert main(["train", "own.toml", "--show", "--set", "run.steps=7"]) == 0
    (tmp_path / "shown.toml").write_text(capsys.readouterr().out)
    assert settings.read("shown.toml") == settings.read("own.toml", ["run.steps=7"])
    assert trained == [] and not (tmp_path / "runs").exists()


def test_train_interrupted_says_what_is_kept(capsys, trained, monkeypatch):
    def train(run, *, note, resume):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["sdjax.training.loop"], "train", train)
    assert main(["train", "own.toml"]) == 130
    assert "stopped: the last checkpoint in runs/own is kept" in capsys.readouterr().err


def test_train_refuses_before_jax_loads():
    code = (
        "import sys; from sdjax.cli import main\n"
        "assert main(['train', 'own.toml', '--set', 'model.vae=a/b/c']) == 2\n"
        "sys.exit('jax' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": ROOT}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_processes_that_start_at_once_share_a_folder(tmp_path):
    """What another is just writing is no stranger's; what stands there by another name is."""
    out = tmp_path / "pod"
    out.mkdir()
    run = settings.read("scenes-vae", [f"run.out={out}"])
    (out / f".{folder.SETTINGS}half").write_text("")
    assert folder.prepare(run) == out
    (out / folder.SETTINGS).rename(out / "other")
    with pytest.raises(InputError, match="holds no run"):
        folder.prepare(run)
