"""A batch is a function of (source, seed, number); positions come back bit for bit."""

import json
import os
import pickle
import socket
import subprocess
import sys
import warnings
from collections import Counter

import numpy as np
import pytest

from sdjax.errors import InputError
from sdjax.training import data
from sdjax.training.data.rows import Rows

SIZE = dict(height=8, width=8)


def make(index):
    """A grey of the example's number, with 24 places to crop."""
    return data.Example(np.full((11, 14, 3), index % 256, np.uint8), f"number {index}", f"n{index}")


def coordinates(index):
    """Every pixel tells where it was."""
    y, x = np.mgrid[:11, :14]
    return data.Example(np.stack([y, x, 0 * x + index], -1).astype(np.uint8), "", "")


def spoiled(index):
    return None if index in (3, 4, 11) else make(index)


def nothing(index):
    return None


def tokenize(captions):
    return np.array([[1, int(c.split()[1]), 2] for c in captions])


def seen(batches, count=None):
    """The examples' numbers, batch by batch."""
    found = []
    while count is None or len(found) < count:
        batch = next(batches, None)
        if batch is None:
            break
        found.append(batch["pixels"][:, 0, 0, -1].tolist())
    return found


def same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert (
            type(one[key]) is type(other[key]) is np.ndarray and one[key].dtype == other[key].dtype
        )
        np.testing.assert_array_equal(one[key], other[key])


FULL = dict(batch_size=4, crop="random", flip=True, time_ids=True, tokenize=tokenize, **SIZE)


def test_a_batch_holds_what_stages_take():
    with data.batches(data.Drawn(make, 9), **FULL) as batches:
        batch = next(batches)
    assert {k: (v.shape, str(v.dtype)) for k, v in batch.items()} == {
        "pixels": ((4, 8, 8, 3), "uint8"),
        "time_ids": ((4, 6), "float32"),
        "ids": ((4, 3), "int32"),
    }
    np.testing.assert_array_equal(batch["ids"][:, 1], batch["pixels"][:, 0, 0, 0])


def test_sdjaxs_tokenizer_is_one_and_sdxl_has_two():
    from sdjax.text import Tokenizer

    tokenizer = Tokenizer.clip()
    source = data.Drawn(make, 2)
    two = {"ids": tokenizer, "ids_2": tokenize}
    with data.batches(source, batch_size=2, shuffle=False, tokenize=two, **SIZE) as batches:
        batch = next(batches)
    np.testing.assert_array_equal(batch["ids"], tokenizer(["number 0", "number 1"]).ids)
    np.testing.assert_array_equal(batch["ids_2"], tokenize(["number 0", "number 1"]))


def test_every_example_comes_once_an_epoch_in_another_order():
    with data.batches(data.Drawn(make, 21), batch_size=3, **SIZE) as batches:
        epochs = [sum(seen(batches, 7), []) for _ in range(3)]
        assert batches.epoch == 3
    assert [sorted(e) for e in epochs] == [list(range(21))] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] != list(range(21))


def test_batches_go_on_from_one_epoch_to_the_next():
    with data.batches(data.Drawn(make, 5), batch_size=3, shuffle=False, **SIZE) as batches:
        assert seen(batches, 4) == [[0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1]]


def test_an_epoch_ends_where_no_batch_is_full():
    with data.batches(data.Drawn(make, 5), batch_size=3, epochs=2, **SIZE) as batches:
        assert len(seen(batches)) == 3


def test_a_batch_may_be_larger_than_the_source():
    with data.batches(data.Drawn(make, 2), batch_size=6, **SIZE) as batches:
        assert Counter(next(batches)["pixels"][:, 0, 0, 0].tolist()) == {0: 3, 1: 3}


def test_seeds_give_other_orders_and_neighbours_share_no_epoch():
    orders = []
    for seed in (0, 1, 2, 2**40):
        with data.batches(data.Drawn(make, 30), batch_size=30, seed=seed, **SIZE) as batches:
            orders += [tuple(batch) for batch in seen(batches, 3)]
    assert len(set(orders)) == len(orders)


def test_the_kth_batch_is_the_same_with_any_number_of_workers():
    source = data.Drawn(spoiled, 23)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with data.batches(source, **FULL) as batches:
            alone = [next(batches) for _ in range(9)]
            skipped = batches.skipped
        with data.batches(source, workers=2, **FULL) as batches:
            for k in range(6):
                same(next(batches), alone[k])
            state = batches.state()
            # What the processes made ahead does not count.
            assert state["examples"] == 24
            for k in (6, 7, 8):
                same(next(batches), alone[k])
            assert batches.skipped == skipped and set(skipped) == {3, 4, 11}
        with data.batches(source, start=state, **FULL) as batches:
            same(next(batches), alone[6])


def test_an_error_in_a_worker_is_the_users_sentence():
    source = data.Drawn(nothing, 5)
    with data.batches(source, batch_size=1, workers=1, **SIZE) as batches:
        with pytest.raises(InputError, match="none of 1000 examples tried could be read"):
            next(batches)


TRAINING = """
import os, signal, sys, time
import numpy as np, psutil
from sdjax.training import data

def make(index):
    return data.Example(np.zeros((8, 8, 3), np.uint8), "", "")

batches = data.batches(data.Drawn(make), batch_size=1, height=8, width=8, workers=1)
next(batches)
workers = [p.pid for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]
for worker in workers:
    os.kill(worker, signal.SIGINT)
for _ in range(20):
    next(batches)
print(*workers, flush=True)
sys.stdin.read()
"""


def test_workers_outlive_ctrl_c_and_end_with_a_killed_training():
    import psutil

    pipe = subprocess.PIPE
    training = subprocess.Popen(
        [sys.executable, "-c", TRAINING], stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )
    assert training.stdout is not None
    workers = [psutil.Process(int(number)) for number in training.stdout.readline().split()]
    assert len(workers) == 1
    training.kill()
    training.communicate()
    psutil.wait_procs(workers, timeout=60)
    gone = [not w.is_running() or w.status() == psutil.STATUS_ZOMBIE for w in workers]
    assert gone == [True]


def test_the_kth_batch_is_the_processes_rows_side_by_side():
    source = data.Drawn(make, 23)
    with data.batches(source, **FULL) as batches:
        alone = [next(batches) for _ in range(8)]
    parts = [data.batches(source, process=(i, 2), **FULL) for i in range(2)]
    for k in range(8):
        rows = [next(part) for part in parts]
        same({key: np.concatenate([r[key] for r in rows]) for key in rows[0]}, alone[k])
    # The position is that of all: two processes go on as one, or one as two.
    assert parts[0].state() == parts[1].state() == {"examples": 32, "seed": 0, "length": 23}
    for part in parts:
        part.close()


@pytest.mark.parametrize("k", [0, 1, 5, 6])
def test_restoring_gives_the_next_batch_bitwise(k):
    source = data.Drawn(make, 11)
    with data.batches(source, seed=5, **FULL) as batches:
        for _ in range(k):
            next(batches)
        state = json.loads(json.dumps(batches.state()))
        after = [next(batches) for _ in range(4)]
        batches.restore(state)
        for expected in after:
            same(next(batches), expected)
    with data.batches(source, seed=5, start=state, **FULL) as batches:
        for expected in after:
            same(next(batches), expected)


def test_seeking_reads_nothing_that_came_before():
    read = []

    def make_noting(index):
        read.append(index)
        return make(index)

    far = {"examples": 3 * 10**12, "seed": 0, "length": 10**9}
    source = data.Drawn(make_noting, 10**9)
    with data.batches(source, batch_size=2, start=far, **SIZE) as batches:
        next(batches)
    assert len(read) < 50


def test_a_position_of_other_data_is_refused():
    batches = data.batches(data.Drawn(make, 9), **FULL)
    state = batches.state()
    with pytest.raises(InputError, match="number of examples 9, and here it is 10"):
        data.batches(data.Drawn(make, 10), start=state, **FULL)
    with pytest.raises(InputError, match="seed 0, and here it is 1"):
        data.batches(data.Drawn(make, 9), start=state, seed=1, **FULL)
    with pytest.raises(InputError, match="counts examples"):
        batches.restore(state | {"examples": -1})
    assert "digest" not in state
    known = data.batches(data.Drawn(make, 9, "a world"), **FULL)
    known.restore(state)  # of an earlier release, which did not ask
    with pytest.raises(InputError, match="saved with other data"):
        data.batches(data.Drawn(make, 9, "another"), start=known.state(), **FULL)
    with pytest.raises(InputError, match="saved with other data"):
        batches.restore(known.state())


def test_what_was_skipped_is_counted_on_after_restoring():
    source = data.Drawn(spoiled, 23)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with data.batches(source, **FULL) as batches:
            while not batches.skipped:
                next(batches)
            state = json.loads(json.dumps(batches.state()))
            for _ in range(6):
                next(batches)
        with data.batches(source, start=state, **FULL) as again:
            assert again.state() == state and state["skipped"]
            for _ in range(6):
                next(again)
    assert set(again.skipped) == set(batches.skipped) == {3, 4, 11}


def test_an_unreadable_examples_row_is_filled_and_nothing_else_moves():
    with data.batches(data.Drawn(make, 23), **FULL) as batches:
        whole = [next(batches) for _ in range(12)]
    with data.batches(data.Drawn(spoiled, 23), **FULL) as batches:
        with pytest.warns(UserWarning, match=r"skipped example \d+ cannot be read") as said:
            holed = [next(batches) for _ in range(12)]
        assert set(batches.skipped) == {3, 4, 11}
    assert len(said) == 3  # each once, though they are met twice
    for full, hole in zip(whole, holed, strict=True):
        for row, number in enumerate(full["ids"][:, 1]):
            if number in (3, 4, 11):
                assert hole["ids"][row, 1] not in (3, 4, 11)
            else:
                same({k: v[row] for k, v in hole.items()}, {k: v[row] for k, v in full.items()})


def test_a_corrupt_image_is_skipped_by_name_and_counted(tmp_path):
    from PIL import Image

    for name in ("a", "b", "c"):
        Image.new("RGB", (9, 9), "red").save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    with data.batches(data.open(tmp_path), batch_size=3, **SIZE) as batches:
        with pytest.warns(UserWarning, match="skipped b.png"):
            for _ in range(3):
                assert (next(batches)["pixels"] == [255, 0, 0]).all()
        assert list(batches.skipped) == [1]


def test_nothing_readable_is_the_users_error():
    with data.batches(data.Drawn(nothing, 5), batch_size=2, **SIZE) as batches:
        with pytest.raises(
            InputError, match="none of 1000 examples tried could be read; the first"
        ):
            next(batches)


def test_small_pictures_are_enlarged_and_counted():
    with data.batches(data.Drawn(make, 4), batch_size=4, height=16, width=8) as batches:
        with pytest.warns(UserWarning, match=r"n\d: 14x11 is smaller than 8x16") as said:
            assert next(batches)["pixels"].shape == (4, 16, 8, 3)
        assert len(batches.enlarged) == 4 and len(said) == 1


def test_every_crop_and_both_sides_come_up():
    corners, mirrored = Counter(), Counter()
    # Rows of 11 x 14 shrink to no less than they are: a crop of 8 x 14 and one of 11 x 8.
    for size in ((8, 14), (11, 8)):
        with data.batches(
            data.Drawn(coordinates, 200),
            batch_size=200,
            height=size[0],
            width=size[1],
            crop="random",
            flip=True,
            time_ids=True,
        ) as batches:
            batch = next(batches)
        for pixels, ids in zip(batch["pixels"], batch["time_ids"], strict=True):
            top, left = ids[2:4].astype(int)
            assert ids.tolist() == [11, 14, top, left, *size]
            y, x = np.mgrid[top : top + size[0], left : left + size[1]]
            flipped = pixels[0, 1, 1] < pixels[0, 0, 1]
            x = 13 - x if flipped else x  # the corner is that of the mirrored picture
            np.testing.assert_array_equal(pixels[..., 0], y)
            np.testing.assert_array_equal(pixels[..., 1], x)
            corners[top, left] += 1
            mirrored[bool(flipped)] += 1
    assert {c[0] for c in corners} == set(range(4)) and {c[1] for c in corners} == set(range(7))
    # 6 standard deviations of a fair coin, 4 of a fair die.
    assert abs(mirrored[True] - 200) < 60 and min(corners.values()) > 10


def test_crops_and_sides_differ_by_epoch_and_by_seed_and_not_by_batch_size():
    def crops(seed, batch_size, epoch):
        rows = Rows(
            data.Drawn(make, 12),
            data.batches(data.Drawn(make, 12), **FULL)._rows.fit,
            {},
            seed,
            False,
            12 * epoch,
            batch_size,
            (0, 1),
            12,
        )
        return [tuple(rows[i].arrays["time_ids"].tolist()) for i in range(12)]

    first = crops(0, 4, 0)
    assert first == crops(0, 6, 0) and first != crops(1, 4, 0) and first != crops(0, 4, 1)


def test_centred_crops_are_those_of_the_reference_training_script():
    # diffusers' train_text_to_image_sdxl.py: max(0, int(round((side - resolution) / 2.0)))
    for height in range(8, 15):
        drawn = data.Drawn(lambda i, h=height: data.Example(np.zeros((h, 8, 3), np.uint8), "", ""))
        with data.batches(drawn, batch_size=1, time_ids=True, **SIZE) as batches:
            top = next(batches)["time_ids"][0, 2]
        assert top == max(0, int(round((height - 8) / 2.0)))


def test_what_runs_ahead_is_bounded():
    read = []

    def make_noting(index):
        read.append(index)
        return make(index)

    with data.batches(data.Drawn(make_noting), batch_size=4, **SIZE) as batches:
        for _ in range(10):
            next(batches)
    assert len(read) <= 40 + 2 * 8 + 1


def test_a_drawn_source_is_endless_and_never_repeats():
    with data.batches(data.Drawn(make), batch_size=64, seed=9, **SIZE) as batches:
        assert sum(seen(batches, 4), []) == list(range(256))
        assert batches.epoch == 0
        assert json.loads(json.dumps(batches.state()))["length"] == data.ENDLESS
    with pytest.raises(InputError, match="no epochs"):
        data.batches(data.Drawn(make), batch_size=1, epochs=1, **SIZE)


def test_sources_follow_each_other():
    joined = data.Joined([data.Drawn(make, 3), data.Drawn(spoiled, 5)])
    assert [e and e.name for e in map(joined.__getitem__, range(8))] == [
        *("n0", "n1", "n2"),
        *("n0", "n1", "n2", None, None),
    ]
    assert joined.digest != data.Joined([data.Drawn(make, 8)]).digest
    assert joined.skipped == {6: "example 3 cannot be read", 7: "example 4 cannot be read"}
    with pytest.raises(InputError, match="endless"):
        data.Joined([data.Drawn(make), data.Drawn(make, 1)])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(batch_size=0), "batch_size must be positive"),
        (dict(batch_size=6, process=(0, 4)), "multiple of 4"),
        (dict(process=(2, 2)), "index below count"),
        (dict(height=0), "height and width must both be positive, got 0 and 8"),
        (dict(width=None), "both be positive, got 8 and None"),
        (dict(height=None, width=None), "need a height and a width"),
        (dict(crop="centre"), "center or random"),
        (dict(seed=-1), "seed must not be negative"),
        (dict(workers=-1), "workers must not be negative"),
        (dict(epochs=1, batch_size=10), "1 epochs of 9 examples do not fill one batch of 10"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(wrong, said):
    with pytest.raises(InputError, match=said):
        data.batches(data.Drawn(nothing, 9), **({"batch_size": 4} | SIZE | wrong))


def test_pixels_of_another_kind_are_refused_by_name():
    source = data.Drawn(lambda i: data.Example(np.zeros((9, 9), np.float32), "", "mine"), 1)
    with pytest.raises((InputError, TypeError), match="mine|pixels"):
        next(data.batches(source, batch_size=1, **SIZE))


def test_what_is_no_example_is_refused_by_number():
    class Tuples:
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return ("pixels", "caption", "name")

    with pytest.raises(InputError, match="example 0 must be an Example or None, got \\('pixels'"):
        next(data.batches(Tuples(), batch_size=1, **SIZE))


def test_the_drawn_world_is_a_source():
    pytest.importorskip("sdjax.training.scenes")
    source = data.open("scenes", height=64, width=96, seed=1)
    assert len(source) == data.ENDLESS
    one, again = source[5], data.open("scenes", height=64, width=96, seed=1)[5]
    assert one.pixels.shape == (64, 96, 3) and one.caption
    np.testing.assert_array_equal(one.pixels, again.pixels)
    assert one.caption == again.caption and one.name == "scene 5 of seed 1"
    other = data.open("scenes", height=64, width=96, seed=2)[5]
    assert (other.pixels != one.pixels).any()
    assert len(data.open("scenes", length=7)) == 7


# Caches


def encode(batch):
    import jax.numpy as jnp

    pixels = batch["pixels"].astype(np.float32)
    return {
        "mean": jnp.asarray(pixels[:, ::4, ::4]) / 8,
        "context": jnp.asarray(pixels[:, 0], jnp.bfloat16),
        "ids": batch["ids"],
    }


def ordered(count=10, **more):
    source = data.Drawn(make, count)
    return data.batches(source, batch_size=4, shuffle=False, tokenize=tokenize, **SIZE, **more)


def test_a_cache_gives_what_was_encoded_and_trains_like_it(tmp_path):
    told = []
    with ordered() as batches:
        cached = data.cache(
            batches, encode, tmp_path / "c", 10, made_of={}, progress=lambda *p: told.append(p)
        )
    assert told == [(4, 10), (8, 10), (10, 10)] and len(cached) == 10
    assert cached.shapes == {"mean": (2, 2, 3), "context": (8, 3), "ids": (3,)}
    for index in range(10):
        want = np.full((2, 2, 3), index / 8, np.float32)
        np.testing.assert_array_equal(cached[index]["mean"], want)
        assert cached[index]["context"].dtype == np.float32
    with data.batches(cached, batch_size=5, seed=3) as batches:
        found = [next(batches) for _ in range(2)]
        state = batches.state()
        third = next(batches)
    assert sorted(np.concatenate([b["ids"][:, 1] for b in found]).tolist()) == list(range(10))
    assert found[0]["mean"].shape == (5, 2, 2, 3) and found[0]["ids"].dtype == np.int32
    sent = pickle.loads(pickle.dumps(data.open_cached(tmp_path / "c")))  # as to a process
    with data.batches(sent, batch_size=5, seed=3, start=state) as batches:
        same(next(batches), third)


def test_a_cache_has_no_copies_in_place_of_what_could_not_be_read(tmp_path):
    source = data.Drawn(spoiled, 13)
    whole = dict(batch_size=4, shuffle=False, tokenize=tokenize, **SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with data.batches(source, **whole) as batches:
            told = batches.skipped
            cached = data.cache(batches, encode, tmp_path / "c", 13, made_of={}, skipped=told)
        assert [n for n in range(13) if cached[n] is None] == [3, 4, 11]
        again = data.open_cached(tmp_path / "c")
        assert again.skipped == told and set(told) == {3, 4, 11}
        with data.batches(again, batch_size=13) as batches:
            numbers = next(batches)["ids"][:, 1]
            assert not {3, 4, 11}.intersection(numbers) and set(batches.skipped) == {3, 4, 11}


def test_a_cache_in_half_precision_is_half_as_large(tmp_path):
    with ordered() as batches:
        cached = data.cache(batches, encode, tmp_path / "c", 4, made_of={}, store="float16")
    assert cached[3]["mean"].dtype == np.float16 and cached[3]["ids"].dtype == np.int32
    np.testing.assert_array_equal(cached[3]["mean"], np.full((2, 2, 3), 3 / 8, np.float16))


def test_what_half_precision_cannot_hold_is_refused(tmp_path):
    def large(batch):
        return {"mean": batch["pixels"].astype(np.float32) + 70000}

    def broken(batch):
        return {"mean": batch["pixels"] / np.float32("nan")}

    with ordered() as batches, pytest.raises(InputError, match="mean reaches 70003, too large"):
        data.cache(batches, large, tmp_path / "c", 4, made_of={}, store="float16")
    with ordered() as batches, pytest.raises(InputError, match="mean holds values that are not"):
        data.cache(batches, broken, tmp_path / "c", 4, made_of={})
    assert not list(tmp_path.iterdir())


def test_a_cache_is_made_once_and_a_stale_one_refused(tmp_path):
    calls = []

    def counting(batch):
        calls.append(len(batch["pixels"]))
        return encode(batch)

    made_of = {"vae": "abc", "size": (8, 8)}
    for _ in range(2):
        with ordered() as batches:
            data.cache(batches, counting, tmp_path / "c", 8, made_of=made_of)
    assert calls == [4, 4]
    for change, said in (
        ({"vae": "xyz"}, "made with vae 'abc', and now it is 'xyz'"),
        ({"size": [8, 9]}, "made with size"),
    ):
        with ordered() as batches, pytest.raises(InputError, match=said):
            data.cache(batches, counting, tmp_path / "c", 8, made_of=made_of | change)
        with pytest.raises(InputError, match=said):
            data.open_cached(tmp_path / "c", made_of | change)
    with ordered() as batches, pytest.raises(InputError, match="made with count 8"):
        data.cache(batches, counting, tmp_path / "c", 9, made_of=made_of)
    assert calls == [4, 4]


def test_a_cache_that_is_not_finished_has_no_name(tmp_path):
    def failing(batch):
        assert not (tmp_path / "c").exists()
        if 4 in batch["pixels"]:
            raise KeyboardInterrupt
        return encode(batch)

    with ordered() as batches, pytest.raises(KeyboardInterrupt):
        data.cache(batches, failing, tmp_path / "c", 8, made_of={})
    assert not list(tmp_path.iterdir())
    with ordered(epochs=1) as batches, pytest.raises(InputError, match="ends after 8 of 10"):
        data.cache(batches, encode, tmp_path / "c", 10, made_of={})


def test_what_a_killed_process_left_of_a_cache_is_swept(tmp_path):
    dead = subprocess.run([sys.executable, "-S", "-c", "import os; print(os.getpid())"], **TEXT)
    host = socket.gethostname()
    for number in (int(dead.stdout), os.getppid()):
        (tmp_path / f".c.{host}.{number}.partial").mkdir()
    with ordered() as batches:
        data.cache(batches, encode, tmp_path / "c", 4, made_of={})
    assert {p.name for p in tmp_path.iterdir()} == {"c", f".c.{host}.{os.getppid()}.partial"}


TEXT = dict(capture_output=True, text=True, check=True)


def test_a_damaged_cache_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"no cache: cache\.json: No such file"):
        data.open_cached(tmp_path / "none")
    with ordered() as batches:
        data.cache(batches, encode, tmp_path / "c", 4, made_of={})
    about = (tmp_path / "c/cache.json").read_text()
    for content, said in (("{", "damaged"), ("[]", "damaged"), ('{"version": 0}', "release")):
        (tmp_path / "c/cache.json").write_text(content)
        with pytest.raises(InputError, match=said):
            data.open_cached(tmp_path / "c")
    (tmp_path / "c/cache.json").write_text(about)
    content = (tmp_path / "c/mean.npy").read_bytes()
    (tmp_path / "c/mean.npy").write_bytes(content[:-9])
    with pytest.raises(InputError, match=r"mean\.npy is damaged"):
        data.open_cached(tmp_path / "c")
