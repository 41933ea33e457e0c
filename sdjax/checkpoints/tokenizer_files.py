"""A tokenizer's folder, in every form that transformers has written, to its parts and back."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sdjax.errors import InputError

LENGTH = 77
"""CLIP's context: the start token, 75 tokens of text, the end token."""

DEFAULTS = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
"""The named tokens of CLIP, where a folder does not say."""

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_ONLY = {"padding_side": "right", "truncation_side": "right", "split_special_tokens": False}
_UNSET = 10**20  # transformers writes 1e30 where nobody set a length
_LONGEST = 4096
_FILE_LIMIT = 64 * 2**20  # CLIP's own files are 3 MB


class Parts(NamedTuple):
    """What a folder holds."""

    vocab: dict[str, int]  # token -> number, 0 to n - 1
    merges: list[list[str]]  # pairs, the most frequent first
    added: list[dict[str, Any]]  # each once: content, FLAGS and perhaps id
    named: dict[str, str]  # bos_token and so on
    length: int


def read(folder: Path) -> Parts:
    """Read `tokenizer.json`, or `vocab.json` and `merges.txt`, with the settings beside them."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder with a tokenizer")
    config_path = folder / "tokenizer_config.json"
    config = _json(config_path, dict, {})
    if (folder / "tokenizer.json").exists():
        vocab, merges, inside = _one_file(folder / "tokenizer.json")
    else:
        vocab, merges = _two_files(folder)
        inside = {}
    # A list of added tokens in the config counts alone; without it, the older files do.
    if "added_tokens_decoder" in config:
        added = _decoder(config["added_tokens_decoder"], config_path)
        special = {}
    else:
        special = _json(folder / "special_tokens_map.json", dict, {})
        config |= special
        added = _older(folder / "added_tokens.json", config) | inside
    for key, value in _ONLY.items():
        if config.get(key, value) != value:
            raise InputError(f"{config_path}: {key} is {config[key]!r}, sdjax knows {value!r} only")
    named = {n: config.get(n) or DEFAULTS.get(n) for n in _NAMED}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if not isinstance(extra, Mapping | list):
        raise InputError(f"{config_path}: extra_special_tokens must be a list, got {extra!r:.80}")
    extra = extra.values() if isinstance(extra, Mapping) else extra
    # As in transformers: listed tokens stand as listed; of others, repeats aside, the last counts.
    tokens = [_token(added[i], config_path) | {"id": i} for i in sorted(added)]
    raw = [t for t in [*named.values(), *extra] if t]
    raw = [t for place, t in enumerate(raw) if t not in raw[:place]]
    others = {t["content"]: t for t in (_token(t, config_path) for t in raw)}
    listed = {t["content"] for t in tokens}
    tokens += [t for content, t in others.items() if content not in listed]
    names = {n: _token(t, config_path)["content"] for n, t in named.items() if t}
    return Parts(vocab, merges, tokens, names, _length(config, config_path))


def write(folder: Path, parts: Parts) -> None:
    """Write the files that every release of transformers reads: vocabulary, merges, settings.

    `added` has every token once, with its id.
    """
    by_content = {t["content"]: t for t in parts.added}
    named = {n: t for n, t in parts.named.items() if n in DEFAULTS}
    detailed: dict[str, Any] = {
        n: {"content": t} | {f: by_content[t][f] for f in FLAGS if f != "special"}
        for n, t in named.items()
    }
    config: dict[str, Any] = {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(t["id"]): {"content": t["content"]} | {f: t[f] for f in FLAGS} for t in parts.added
        },
        **named,
        "clean_up_tokenization_spaces": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": parts.length,
        "tokenizer_class": "CLIPTokenizer",
    }
    more = [t["content"] for t in parts.added if t["special"]]
    more = [t for t in more if t not in named.values()]
    if more:
        config["additional_special_tokens"] = detailed["additional_special_tokens"] = more
    files = {
        "vocab.json": json.dumps(parts.vocab, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, parts.merges), ""]),
        "special_tokens_map.json": json.dumps(detailed, indent=2, ensure_ascii=False) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }
    new = {t["content"]: t["id"] for t in parts.added if t["content"] not in parts.vocab}
    if new:
        files["added_tokens.json"] = json.dumps(new, indent=2, ensure_ascii=False) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_bytes(text.encode())


def read_bytes(path: Path) -> bytes:
    """A small file whole; InputError if it is missing, a folder, unreadable or over 64 MiB."""
    try:
        if not path.exists():
            raise InputError(f"{path} is not there")
        if path.is_dir():
            raise InputError(f"{path} is a folder: give a file")
        with path.open("rb") as file:
            data = file.read(_FILE_LIMIT + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > _FILE_LIMIT:
        raise InputError(f"{path} is larger than {_FILE_LIMIT // 2**20} MiB")
    return data


def _json(path: Path, kind: type, default: Any = None) -> Any:
    """The file's content, which must be of this kind; the default where there is no file."""
    if default is not None and not path.exists():
        return default
    data = read_bytes(path)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, kind):
        raise InputError(f"{path} must hold a JSON object, got {value!r:.80}")
    return value


def _two_files(folder: Path) -> tuple[dict[str, int], list[list[str]]]:
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).exists():
            raise InputError(f"{folder} has neither {name} nor tokenizer.json")
    vocab = _vocab(_json(folder / "vocab.json", dict), folder / "vocab.json")
    path = folder / "merges.txt"
    try:
        lines = read_bytes(path).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 at byte {error.start}") from None
    lines = [x.rstrip("\r") for x in lines if x.strip() and not x.startswith("#version")]
    return vocab, _merges([x.split(" ") for x in lines], vocab, path)


def _one_file(path: Path) -> tuple[dict[str, int], list[list[str]], dict[int, Any]]:
    content = _json(path, dict)
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise InputError(f"{path}: model must be a byte-pair encoding (BPE)")
    vocab = _vocab(model.get("vocab"), path)
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise InputError(f"{path}: model.merges must be a list")
    merges = [m.split(" ") if isinstance(m, str) else m for m in merges]
    added = content.get("added_tokens") or []
    if not isinstance(added, list) or not all(
        isinstance(t, dict) and _is_number(t.get("id")) for t in added
    ):
        raise InputError(f"{path}: added_tokens must be a list of tokens with ids")
    return vocab, _merges(merges, vocab, path), {t["id"]: t for t in added}


def _vocab(vocab: Any, path: Path) -> dict[str, int]:
    if not isinstance(vocab, dict) or not vocab:
        raise InputError(f"{path}: the vocabulary must map tokens to numbers")
    last = len(vocab) - 1
    if {v for v in vocab.values() if _is_number(v) and v <= last} != set(range(last + 1)):
        raise InputError(f"{path}: the vocabulary's numbers must be 0 to {last}, each once")
    return vocab


def _merges(merges: Iterable[Any], vocab: Mapping[str, int], path: Path) -> list[list[str]]:
    """The merges, of which the tokenizers library would take some broken ones."""
    kept = list(merges)
    for number, pair in enumerate(kept, 1):
        texts = isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) for p in pair)
        if not texts or any(p not in vocab for p in (*pair, "".join(pair))):
            raise InputError(
                f"{path}: merge {number}, {pair!r:.80}, is not two tokens that make a third"
            )
    return kept


def _decoder(value: Any, path: Path) -> dict[int, Any]:
    if isinstance(value, Mapping) and all(i.isdecimal() and len(i) < 10 for i in value):
        return {int(i): t for i, t in value.items()}
    raise InputError(f"{path}: added_tokens_decoder must map numbers to tokens")


def _older(path: Path, config: Mapping[str, Any]) -> dict[int, Any]:
    """`added_tokens.json`, which says no flags: named tokens are special, others normalized."""
    special = {_token(config[n], path)["content"] for n in _NAMED if config.get(n)}
    added = {}
    for content, number in _json(path, dict, {}).items():
        if not _is_number(number):
            raise InputError(f"{path}: {content!r:.80} must have a number, got {number!r:.80}")
        named = content in special
        added[number] = {"content": content, "normalized": not named, "special": named}
    return added


def _token(token: Any, path: Path) -> dict[str, Any]:
    """An added token as a dict with all its flags, from a dict or a bare text."""
    flags = token if isinstance(token, Mapping) else {"content": token, "special": True}
    if not isinstance(flags.get("content"), str):
        raise InputError(f"{path}: a token must be text, got {token!r:.80}")
    special = bool(flags.get("special"))
    normalized = bool(flags.get("normalized", not special))
    kept = {f: bool(flags.get(f)) for f in FLAGS}
    return {"content": flags["content"]} | kept | {"normalized": normalized}


def _length(config: Mapping[str, Any], path: Path) -> int:
    value = config.get("model_max_length")
    if value is None or (isinstance(value, int | float) and value >= _UNSET):
        return LENGTH
    if not _is_number(value) or not 3 <= value <= _LONGEST:
        raise InputError(f"{path}: model_max_length must be 3 to {_LONGEST}, got {value!r:.80}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
