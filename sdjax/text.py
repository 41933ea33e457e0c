"""Prompts to token ids: CLIP's byte-pair tokenizer, and files of prompts."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int

from sdjax.errors import InputError

if TYPE_CHECKING:
    from sdjax.checkpoints.tokenizer_files import Parts

_SPLIT = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


class Tokens(NamedTuple):
    """What a batch of prompts became."""

    ids: Int[np.ndarray, "b n"]  # int32, padded and truncated to the tokenizer's length
    dropped: list[str]  # of each prompt the text that did not fit, "" where all did


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """CLIP's tokenizer: hashable, and equal to any other that has the same content.

    Byte-pair encoding (Radford et al. 2021, arXiv 2103.00020, section 2.4) in the form of
    `CLIPTokenizer` in transformers 5.23: NFC, runs of white space become one space, lower case.
    Like every release of transformers it is blind to `do_lower_case` in a config.
    """

    definition: str = dataclasses.field(repr=False)  # a tokenizer.json: vocabulary, merges, tokens
    bos_token: str
    eos_token: str
    unk_token: str
    pad_token: str
    length: int

    @classmethod
    def clip(cls, pad: str = "<|endoftext|>") -> "Tokenizer":
        """The tokenizer that ships with sdjax, for checkpoints without one.

        SD1 and SDXL's first encoder pad with `<|endoftext|>`, SD2 and SDXL's second with `!`.
        """
        return _shipped(pad)

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Read the folder of a CLIP tokenizer, as any release of transformers saved it."""
        from sdjax.checkpoints import tokenizer_files

        return build(tokenizer_files.read(Path(folder)), str(folder))

    @property
    def size(self) -> int:
        """1 + the largest id of any token, added ones among them."""
        return 1 + max(_backend(self.definition).get_vocab().values())

    def save(self, folder: str | Path) -> None:
        """Write a folder that every release of transformers reads."""
        from sdjax.checkpoints import tokenizer_files

        content = json.loads(self.definition)
        model = content["model"]
        named = {n: getattr(self, n) for n in tokenizer_files.DEFAULTS}
        parts = tokenizer_files.Parts(
            model["vocab"], model["merges"], content["added_tokens"], named, self.length
        )
        tokenizer_files.write(Path(folder), parts)

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Token ids of each prompt: start, up to `length - 2` tokens of text, end, padding."""
        backend = _backend(self.definition)
        named = self.bos_token, self.eos_token, self.pad_token
        bos, eos, pad = (backend.token_to_id(token) for token in named)
        room = self.length - 2
        ids = np.full((len(prompts), self.length), pad, np.int32)
        dropped = []
        for row, prompt in zip(ids, prompts, strict=True):
            encoding = backend.encode(valid(prompt), add_special_tokens=False)
            kept = [bos, *encoding.ids[:room], eos]
            row[: len(kept)] = kept
            cut = encoding.offsets[room:]
            dropped.append(prompt[cut[0][0] : cut[-1][1]].strip() if cut else "")
        return Tokens(ids, dropped)


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a UTF-8 text file, one a line; a BOM and blank lines are passed over.

    A line ends in LF, CRLF or CR.
    """
    from sdjax.checkpoints.tokenizer_files import read_bytes

    prompts = []
    data = read_bytes(Path(path)).removeprefix(b"\xef\xbb\xbf")
    for number, line in enumerate(data.splitlines(), 1):
        where = f"{path}, line {number}"
        if b"\0" in line:
            raise InputError(f"{where}: a NUL character: save the file as plain UTF-8 text")
        try:
            prompt = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            byte = line[error.start]
            raise InputError(
                f"{where}: byte {error.start + 1} (0x{byte:02x}) is not UTF-8: "
                "save the file as UTF-8"
            ) from None
        if prompt:
            prompts.append(prompt)
    if not prompts:
        raise InputError(f"{path} holds no prompts: write one a line")
    return prompts


def valid(text: Any, name: str = "prompt") -> str:
    """What a user gave under this name, if it is text that has an encoding."""
    if not isinstance(text, str):
        raise InputError(f"the {name} must be text, got {text!r:.80}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"the {name} {ascii(text):.80} is not valid Unicode: character {error.start + 1} is "
            f"the lone surrogate U+{ord(text[error.start]):04X}"
        ) from None
    return text


@functools.lru_cache(maxsize=8)
def _backend(definition: str) -> Any:
    import tokenizers

    return tokenizers.Tokenizer.from_str(definition)


@functools.lru_cache(maxsize=4)
def _shipped(pad: str) -> Tokenizer:
    from sdjax.checkpoints import tokenizer_files

    folder = Path(__file__).parent / "assets" / "clip_tokenizer"
    parts = tokenizer_files.read(folder)
    if pad not in parts.vocab:
        raise InputError(f"pad must be a token of CLIP's vocabulary, got {pad!r}: try '!'")
    token = parts.added[0] | {"content": pad}
    parts = parts._replace(added=[*parts.added, token], named={**parts.named, "pad_token": pad})
    return build(parts, str(folder))


def build(parts: "Parts", where: str) -> Tokenizer:
    """Number the added tokens as transformers does, and write all parts into one definition."""
    vocab, named = parts.vocab, parts.named
    if named["unk_token"] not in vocab:
        raise InputError(f"{where}: unk_token {named['unk_token']!r} is not in the vocabulary")
    tokens: dict[str, dict] = {}
    free = len(vocab)
    for token in parts.added:
        content = token["content"]
        if not content or content in tokens:
            continue
        number = vocab.get(content, free)
        free += number == free
        if token.get("id", number) != number:
            raise InputError(
                f"{where}: the added token {content!r} has the id {token['id']}, but the "
                f"vocabulary gives it {number}"
            )
        special = token["special"] or content in named.values()
        tokens[content] = token | {"id": number, "special": special}
    definition = {
        "version": "1.0",
        "added_tokens": sorted(tokens.values(), key=lambda token: token["id"]),
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": _SPLIT},
                    "behavior": "Removed",
                    "invert": True,
                },
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": True,
                },
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": named["unk_token"],
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": parts.merges,
        },
    }
    text = json.dumps(definition, separators=(",", ":"))
    try:
        _backend(text)
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{where}: the tokenizer cannot be built: {error}") from None
    return Tokenizer(
        definition=text,
        bos_token=named["bos_token"],
        eos_token=named["eos_token"],
        unk_token=named["unk_token"],
        pad_token=named["pad_token"],
        length=parts.length,
    )
