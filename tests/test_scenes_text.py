"""What captions ask for, as numbers, and the text encoder that learns to hear it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import torch

from sdjax.models.clip import CLIPTextModel
from sdjax.training.scenes import Asked, AskedGroup, asked, caption, scene, vocabulary
from sdjax.training.scenes.hearing import Hearing
from sdjax.training.scenes.labels import VIEWS, WISHES, heard, wishes
from sdjax.training.scenes.world import COLOURS, COUNTS, KINDS, PLACES
from sdjax.training.vocabulary import learn

ENCODER = CLIPTextModel.from_config(
    {
        "vocab_size": 839,
        "max_position_embeddings": 32,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "bos_token_id": 837,
        "eos_token_id": 838,
    }
)
STEP = jnp.int32(0)


def batch(count: int) -> dict[str, np.ndarray]:
    tokenizer = learn(vocabulary(), 32)
    rows = [heard(tokenizer, 5, index) for index in range(count)]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def test_a_vocabulary_is_learnt_alike_every_time_and_knows_its_words():
    """A run that goes on, and every process of a pod, learns it again."""
    words = vocabulary()
    first, *others = (learn(words, 32) for _ in range(4))
    assert {other.definition for other in others} == {first.definition}
    known = [word for word in words if word.isalpha()]
    ids = first(known).ids
    assert known and (ids[:, 2:] == ids[:, -1:]).all()  # start, the word, and ends from there on


def told(numbers: np.ndarray) -> Asked:
    """The inverse of `wishes`, but for the order of groups."""
    views = {
        name: ([None, *values])[number]
        for (name, values), number in zip(VIEWS.items(), numbers, strict=False)
    }
    groups = []
    for kind, (count, colour, place) in zip(
        KINDS, numbers[len(VIEWS) :].reshape(-1, 3), strict=True
    ):
        if count:
            groups.append(
                AskedGroup(
                    kind,
                    [None, *COLOURS][colour],
                    [*COUNTS, None][count - 1],
                    [None, *PLACES][place],
                )
            )
    return Asked(**views, groups=tuple(groups))


def test_wishes_hold_all_that_a_caption_asks_for():
    for index in range(300):
        wanted = asked(caption(scene(7, index), index))
        numbers = wishes(wanted)
        assert len(numbers) == len(WISHES) and (numbers < WISHES).all()
        back = told(numbers)
        assert set(back.groups) == set(wanted.groups)
        assert all(getattr(back, name) == getattr(wanted, name) for name in VIEWS)


def test_the_loss_is_torchs_cross_entropy_of_what_both_places_say():
    stage, given = Hearing(ENCODER), batch(6)
    params, extra = stage.init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 6)
    loss = stage.gradients(params, extra, {}, given, keys, STEP).metrics["loss"]
    states = ENCODER.apply({"params": params["text_encoder"]}, given["ids"]).states
    ends = (given["ids"] == 838).argmax(-1)
    kernel = torch.tensor(np.asarray(params["heads"]["kernel"]))
    wanted = 0.0
    for place in (ends, np.full(6, 31)):
        read = torch.tensor(np.asarray(states)[np.arange(6), place]) @ kernel
        starts = [0, *itertools.accumulate(WISHES)]
        for n, (low, high) in enumerate(itertools.pairwise(starts)):
            labels = torch.tensor(given["labels"][:, n]).long()
            wanted += torch.nn.functional.cross_entropy(read[:, low:high], labels).item() / 2
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)


def test_hearing_learns_the_mean_over_captions():
    stage, given = Hearing(ENCODER), batch(4)
    params, extra = stage.init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 4)
    gradients = jax.jit(stage.gradients)
    whole = gradients(params, extra, {}, given, keys, STEP)
    parts = [
        gradients(params, extra, {}, {k: v[half] for k, v in given.items()}, keys[half], STEP)
        for half in (slice(0, 2), slice(2, 4))
    ]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, parts[0].grads, parts[1].grads)
    for a, b in zip(jax.tree.leaves(whole.grads), jax.tree.leaves(mean), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(np.abs(a).max()) + 1e-6)
