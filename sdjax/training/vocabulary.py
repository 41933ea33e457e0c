"""A tokenizer of one's own, in CLIP's file format: byte pairs learnt from a list of words."""

import json
from collections.abc import Iterable
from typing import Any

from sdjax.checkpoints import tokenizer_files
from sdjax.text import Tokenizer, build

START, END = "<|startoftext|>", "<|endoftext|>"


def learn(words: Iterable[str], length: int) -> Tokenizer:
    """A tokenizer that knows each of the words as one token, and can spell everything else.

    Sennrich et al. 2016 (arXiv 1508.07909) until no pair is left. As in CLIP the vocabulary begins
    with all bytes, alone and ending a word, and ends with the two marks. `length` counts them.
    """
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1_000_000,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=alphabet,
        # Numbered here, lest they be in the order of a hash, which would break ties by chance.
        special_tokens=[c + "</w>" for c in alphabet],
        end_of_word_suffix="</w>",
    )
    model.train_from_iterator(sorted(set(words)), trainer)
    merges: list[Any] = json.loads(model.to_str())["model"]["merges"]
    tokens = [*alphabet, *(c + "</w>" for c in alphabet)]
    tokens += dict.fromkeys("".join(pair) for pair in merges)
    tokens += [START, END]
    named = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    flags = dict.fromkeys(tokenizer_files.FLAGS, False)
    added = [{"content": token} | flags | {"special": True} for token in (START, END)]
    vocab = {token: number for number, token in enumerate(tokens)}
    return build(tokenizer_files.Parts(vocab, merges, added, named, length), "a learnt vocabulary")
