"""A checkpoint comes back bit for bit, is whole or not there, and is said only when it is there."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdjax import errors
from sdjax.errors import InputError
from sdjax.training import checkpoints as checkpoints_module
from sdjax.training.checkpoints import Checkpoints

ROOT = str(Path(errors.__file__).parent.parent)


@pytest.fixture
def opened(tmp_path):
    """Checkpoints in a folder, opened as often as wanted, with all they said."""
    made = []

    def open_(name="run", keep=2):
        said = []
        made.append(Checkpoints(tmp_path / name, keep, said.append))
        return made[-1], said

    yield open_
    for checkpoints in made:
        checkpoints.close()


def state(seed=0):
    """One of everything that a training state is made of."""
    key = jax.random.key(seed)
    kernel = jax.random.normal(key, (8, 3, 5))
    params = {
        "unet": {"conv_in": {"kernel": kernel}, "a.b": kernel[0].astype(jnp.bfloat16)},
        "empty": {},
        "none": jnp.zeros((0, 4)),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return {
        "step": jnp.int32(7),
        "params": params,
        "optimizer": optimizer.init(params),
        "key": key,
        "keys": jax.random.split(jax.random.key(seed, impl="rbg"), 3),
        "flags": jnp.array([True, False]),
        "counts": jnp.arange(5, dtype=jnp.uint8),
        "odd": jnp.array([np.nan, -0.0, np.inf, 1e-42], jnp.float32),
    }


def bits(tree):
    """The very bytes of every leaf."""
    leaves = jax.tree.leaves(tree)
    raw = [
        jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for leaf in leaves
    ]
    return [(str(a.dtype), a.shape, np.asarray(a).tobytes()) for a in raw]


def shapes(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)


def ruin(folder, step):
    """Flip one bit in the largest file of a checkpoint: zstd does not notice."""
    files = [path for path in (folder / str(step) / "state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 0x10
    largest.write_bytes(data)


@pytest.mark.parametrize("abstract", [False, True])
def test_a_state_comes_back_bit_for_bit(opened, abstract):
    before = state()
    checkpoints, said = opened()
    extra = {"data": {"position": [3, 0.1]}, "settings": {"run": {"steps": 10}}}
    checkpoints.save(7, before, extra)
    checkpoints.wait()
    assert said == ["saved step 7"]
    again, _ = opened()
    step, after, rest = again.restore_latest(shapes(before) if abstract else state(1))
    assert step == 7 and rest == extra
    assert jax.tree.structure(after) == jax.tree.structure(before)
    assert bits(after) == bits(before)
    assert jax.random.key_impl(after["keys"]) == jax.random.key_impl(before["keys"])
    assert (jax.random.bits(after["key"]) == jax.random.bits(before["key"])).all()


def test_what_is_saved_may_be_donated_at_once(opened):
    checkpoints, _ = opened()
    tree = {"a": jax.random.normal(jax.random.key(0), (1 << 20,))}
    like, before = shapes(tree), bits(tree)
    checkpoints.save(1, tree, {})
    spoiled = jax.jit(lambda t: jax.tree.map(lambda a: a * 0 + 7, t), donate_argnums=0)(tree)
    jax.block_until_ready(spoiled)
    checkpoints.wait()
    assert bits(checkpoints.restore_latest(like)[1]) == before


def test_one_bit_changes_the_sum_and_the_mesh_does_not():
    for leaf in jax.tree.leaves(state()):
        if not leaf.size or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue
        array = np.array(leaf)
        mark = int(checkpoints_module._mark(array, np))
        assert int(checkpoints_module._compiled_mark(leaf)) == mark
        raw = array.reshape(-1).view(np.uint8)
        for byte in {0, raw.size // 2, raw.size - 1}:
            raw[byte] ^= 1
            assert int(checkpoints_module._mark(array, np)) != mark
            raw[byte] ^= 1
    swapped = np.array([1.0, 2.0, 3.0]), np.array([2.0, 1.0, 3.0])
    marks = [int(checkpoints_module._mark(a.astype(np.float32), np)) for a in swapped]
    assert marks[0] != marks[1]


def test_an_empty_folder_has_nothing_to_restore(opened):
    checkpoints, said = opened()
    assert checkpoints.restore_latest(state()) is None and said == []


def test_the_newest_stay(opened, tmp_path):
    checkpoints, said = opened(keep=2)
    for step in (10, 20, 100):
        checkpoints.save(step, {"a": jnp.full(3, step)}, {"step": step})
    checkpoints.wait()
    assert checkpoints.steps() == [20, 100]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["100", "20"]
    step, tree, extra = checkpoints.restore_latest({"a": jnp.zeros(3, int)})
    assert (step, extra) == (100, {"step": 100}) and tree["a"].tolist() == [100] * 3
    assert said == ["saved step 10", "saved step 20", "saved step 100"]


def test_saved_is_said_only_when_it_is_there(opened, tmp_path, monkeypatch):
    checkpoints, said = opened()
    committing, held, rename = threading.Event(), threading.Event(), os.rename

    def late(*paths, **named):
        committing.set()
        assert held.wait(60)
        return rename(*paths, **named)

    monkeypatch.setattr(os, "rename", late)
    monkeypatch.setattr(os, "replace", late)
    checkpoints.save(1, state(), {})
    assert committing.wait(60)
    checkpoints.poll()
    assert said == [] and checkpoints.steps() == []
    assert not (tmp_path / "run" / "1").exists()
    held.set()
    checkpoints.wait()
    assert said == ["saved step 1"] and checkpoints.steps() == [1]
    assert (tmp_path / "run" / "1").is_dir()


def test_a_save_that_fails_is_said_and_the_next_is_tried(opened, tmp_path, monkeypatch):
    checkpoints, said = opened()
    checkpoints.save(1, state(), {})
    checkpoints.wait()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", full)
        patch.setattr(os, "replace", full)
        checkpoints.save(2, state(), {})
        with pytest.raises(InputError) as error:
            checkpoints.wait()
    assert f"step 2 could not be saved in {tmp_path}/run: " in str(error.value)
    assert "No space left on device" in str(error.value)
    assert said == ["saved step 1", f"warning: {error.value}"]
    checkpoints.save(3, state(3), {})
    checkpoints.wait()
    assert said[-1] == "saved step 3" and checkpoints.steps() == [1, 3]
    assert bits(checkpoints.restore_latest(state())[1]) == bits(state(3))


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(opened, tmp_path):
    checkpoints, _ = opened()
    for step in (1, 2):
        checkpoints.save(step, {"a": jax.random.normal(jax.random.key(step), (1 << 16,))}, {})
    like = {"a": jnp.zeros(1 << 16)}
    checkpoints.close()
    ruin(tmp_path / "run", 2)
    again, said = opened()
    step, tree, _ = again.restore_latest(like)
    assert step == 1 and bits(tree) == bits({"a": jax.random.normal(jax.random.key(1), (1 << 16,))})
    assert said == [
        f"checkpoint {tmp_path}/run/2 is damaged (a is not what was saved): not used",
        "going on from step 1",
    ]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["1", "2.damaged"]
    again.save(2, like, {})
    again.wait()
    assert again.steps() == [1, 2]


def test_damage_to_any_file_is_noticed_or_harmless(opened, tmp_path):
    checkpoints, _ = opened()
    tree = {"a": jax.random.normal(jax.random.key(0), (1 << 12,)), "b": jnp.arange(9)}
    checkpoints.save(1, tree, {"x": 0.1})
    checkpoints.close()
    good = tmp_path / "run"
    refused = 0
    for number, path in enumerate(sorted(p for p in good.rglob("*") if p.is_file())):
        folder = tmp_path / f"copy{number}"
        shutil.copytree(good, folder)
        os.truncate(folder / path.relative_to(good), path.stat().st_size // 2)
        copy, _ = opened(folder.name)
        try:
            _, read, extra = copy.restore_latest(tree)
            assert bits(read) == bits(tree) and extra == {"x": 0.1}
        except InputError as error:
            refused += 1
            assert f"no checkpoint in {folder} can be read (1: " in str(error)
            assert "\n" not in str(error)
            assert (folder / "1").is_dir()  # the only one: left for who may mend it
    assert refused >= 3


def test_another_model_is_refused_by_the_name_of_what_differs(opened, tmp_path):
    checkpoints, said = opened()
    checkpoints.save(5, {"a": jnp.zeros((2, 3)), "b": jnp.zeros(2)}, {})
    checkpoints.wait()
    del said[:]
    for like, sentence in [
        ({"a": jnp.zeros((2, 4)), "b": jnp.zeros(2)}, "a is float32[2, 3] in"),
        ({"a": jnp.zeros((2, 3)), "b": jnp.zeros(2, jnp.bfloat16)}, "and bfloat16[2] in this run"),
        ({"a": jnp.zeros((2, 3))}, f"{tmp_path}/run/5 has b and this run has none"),
        ({"a": jnp.zeros((2, 3)), "b": jnp.zeros(2), "c": jnp.zeros(2)}, "5 has no c and this run"),
    ]:
        with pytest.raises(InputError, match="take the settings that it was saved with") as error:
            checkpoints.restore_latest(like)
        assert sentence in str(error.value)
    assert said == [] and checkpoints.steps() == [5]


KILLED = """
import os, signal, sys
import jax, jax.numpy as jnp
from sdjax.training.checkpoints import Checkpoints

folder, when = sys.argv[1:]
def tree(step):
    return {"a": jax.random.normal(jax.random.key(step), (1 << 22,)), "b": jnp.int32(step)}
def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

checkpoints = Checkpoints(folder, 2, lambda line: print(line, flush=True))
checkpoints.save(1, tree(1), {"x": 1})
checkpoints.wait()
if when == "committing":
    os.rename = os.replace = kill
checkpoints.save(2, tree(2), {"x": 2})
if when == "writing":
    kill()
checkpoints.wait()
"""


@pytest.mark.parametrize("when", ["writing", "committing"])
def test_a_kill_while_saving_leaves_the_one_before(opened, tmp_path, when):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "run"), when],
        env=os.environ | {"PYTHONPATH": ROOT},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout.splitlines() == ["saved step 1"]
    left = len(list((tmp_path / "run").iterdir()))
    assert left == 2 or (left == 1 and when == "writing")  # one is half-written
    checkpoints, said = opened()
    like = {"a": jnp.zeros(1 << 22), "b": jnp.int32(0)}
    step, tree, extra = checkpoints.restore_latest(like)
    assert (step, extra, int(tree["b"]), said) == (1, {"x": 1}, 1, [])
    assert bits(tree["a"]) == bits(jax.random.normal(jax.random.key(1), (1 << 22,)))
    checkpoints.save(2, like, {})
    checkpoints.wait()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["1", "2"]


MESHES = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from sdjax.training.checkpoints import Checkpoints

values = {
    "a": jax.random.normal(jax.random.key(1), (16, 8)),
    "b": jax.random.normal(jax.random.key(2), (4, 16)).astype(jnp.bfloat16),
    "key": jax.random.key(3),
}
specs = {"a": P("fsdp"), "b": P(None, "fsdp"), "key": P()}
for step, devices in enumerate((4, 2, 1, 4)):
    mesh = jax.make_mesh((devices,), ("fsdp",), devices=jax.devices()[:devices])
    like = {
        name: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=NamedSharding(mesh, specs[name]))
        for name, v in values.items()
    }
    checkpoints = Checkpoints(sys.argv[1], 1)
    if checkpoints.steps():
        values = checkpoints.restore_latest(like)[1]
        for name, value in values.items():
            assert value.sharding == like[name].sharding, name
    else:
        values = jax.tree.map(lambda v, s: jax.device_put(v, s.sharding), values, like)
    checkpoints.save(step, values, {})
    checkpoints.close()
assert bool((values["a"] == jax.random.normal(jax.random.key(1), (16, 8))).all())
b = jax.random.normal(jax.random.key(2), (4, 16)).astype(jnp.bfloat16)
assert bool((values["b"] == b).all()) and values["key"] == jax.random.key(3)
"""


def test_a_checkpoint_of_one_mesh_is_read_onto_another(tmp_path):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", MESHES, str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": ROOT} | flags,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
