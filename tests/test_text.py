"""Tokens equal those of transformers' CLIPTokenizer; broken folders and prompts are refused."""

import json
import random
import subprocess
import sys

import pytest

from sdjax.errors import InputError
from sdjax.text import Tokenizer, read_prompts

HARD = [
    "",
    " \t\n ",
    "a photograph of an astronaut riding a horse",
    "emoji \N{PARTY POPPER}\N{MAN}\u200d\N{WOMAN}\u200d\N{GIRL} \U0001f1e9\U0001f1ea",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u202eabc\u202c",
    "\x00\x01 a\x7f\x1b[0m\x85b\r\nc",
    "&amp; &lt;b&gt; &#39; caf\u00e9 cafe\u0301 \u1e9b\u0323",
    "\u0130stanbul I\u0131 \u015e\u00df \u03a3\u03b1\u03a3",
    "zero\u200bwidth\u200djoin\ufeff\u00adx",
    "<|endoftext|> hi<|startoftext|>there",
    "<|ENDOFTEXT|> <|EndOfText|>",
    "wow!!! ! !a! hello!",
    "it's we'll I'D 'S don't",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8 \u4e2d\u6587 \ud55c\uae00",
    "12345 \u0663 \u2167 \u00bd x\u00b2",
    "\u2028 \u00a0\u3000 x\x0b\x0cy",
    "z\u0338\u0321\u0321\u0327\u0308\u0300" * 5,
    "((a:1.2), [b|c], {d}) -- __e__ @#$%^&*",
    "word " * 200,
    "a" * 3000,
    "\N{PARTY POPPER}" * 60,
    "\ufffd\uffff\U0010ffff",
]


def transformers_tokens(tokenizer, prompts):
    return tokenizer(prompts, padding="max_length", max_length=77, truncation=True).input_ids


def same_tokens(folder, prompts=HARD, **named):
    from transformers import CLIPTokenizer

    theirs = transformers_tokens(CLIPTokenizer.from_pretrained(folder, **named), prompts)
    ours = Tokenizer.load(folder)(prompts).ids.tolist()
    for prompt, a, b in zip(prompts, ours, theirs, strict=True):
        assert a == b, repr(prompt[:60])


@pytest.fixture(scope="module")
def two_files(tmp_path_factory):
    """A folder as OpenAI's files come: vocabulary and merges, nothing else."""
    from sdjax import text

    folder = tmp_path_factory.mktemp("tokenizer")
    assets = text.Path(text.__file__).parent / "assets" / "clip_tokenizer"
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((assets / name).read_bytes())
    return folder


def copied(source, target, **files):
    target.mkdir(exist_ok=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    for name, content in files.items():
        (target / f"{name}.json").write_text(json.dumps(content))
    return target


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_shipped_tokens_equal_those_of_transformers(two_files, pad):
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(two_files, pad_token=pad)
    assert Tokenizer.clip(pad)(HARD).ids.tolist() == transformers_tokens(theirs, HARD)


def test_tokens_of_random_unicode_equal_those_of_transformers(two_files):
    draw = random.Random(0)
    blocks = [(1, 127), (32, 127), (128, 0x600), (0x600, 0x2100), (0x2000, 0x2070), (0x300, 0x370)]
    blocks += [(0x2100, 0xD800), (0xE000, 0x10000), (0x1F300, 0x1FA00), (0x10000, 0x110000)]
    pieces = ["<|endoftext|>", "'s", "  ", "cat", "&amp;", "!", "\r\n"]

    def letter():
        return chr(draw.randrange(*draw.choice(blocks)))

    prompts = [
        "".join(draw.choice(pieces) if draw.random() < 0.2 else letter() for _ in range(n))
        for n in (draw.randrange(60) for _ in range(400))
    ]
    same_tokens(two_files, prompts)


def test_folders_of_every_age_give_the_tokens_of_transformers(two_files, tmp_path):
    def token(content, **flags):
        rest = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": True}
        return {"content": content} | rest | flags

    start, end = token("<|startoftext|>"), token("<|endoftext|>")
    sd1 = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": "<|endoftext|>"}
    sd2 = {
        "bos_token": token("<|startoftext|>", normalized=False),
        "eos_token": token("<|endoftext|>", normalized=False),
        "unk_token": token("<|endoftext|>", normalized=False),
        "pad_token": "!",
    }
    typed = {k: v | {"__type": "AddedToken"} if isinstance(v, dict) else v for k, v in sd1.items()}
    config = {"model_max_length": 77, "do_lower_case": True, "tokenizer_class": "CLIPTokenizer"}
    decoder = {
        "0": token("!", normalized=False, special=True),
        "49406": token("<|startoftext|>", special=True),
        "49407": token("<|endoftext|>", special=True),
        "49408": token("<Toy> x", lstrip=True, special=False),
    }
    plain = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "!"}
    hugging = {"<toy>": 49408, "Moody-Light": 49409}
    ages = {
        "sd1": {"special_tokens_map": sd1, "tokenizer_config": config | typed},
        "sd2": {"special_tokens_map": sd2, "tokenizer_config": config},
        "map": {"special_tokens_map": sd2},
        "decoder": {"tokenizer_config": config | plain | {"added_tokens_decoder": decoder}},
        "inversion": {"special_tokens_map": sd1, "added_tokens": hugging},
        "extra": {"tokenizer_config": config | {"additional_special_tokens": ["<a>", "<B>"]}},
        "long": {"tokenizer_config": config | {"model_max_length": 10**30}},
        "upper": {"tokenizer_config": config | {"do_lower_case": False}},
    }
    prompts = [*HARD, "a <toy> in moody-light, Moody-Light, <TOY> x,<Toy> x <a><B> <b>"]
    for age, files in ages.items():
        folder = copied(two_files, tmp_path / age, **files)
        same_tokens(folder, prompts)
        assert Tokenizer.load(folder).length == 77


def test_saved_folders_come_back_equal_here_and_in_transformers(two_files, tmp_path):
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(two_files, pad_token="!")
    theirs.add_tokens(["<toy>", "Moody-Light"])
    theirs.save_pretrained(tmp_path / "theirs")  # tokenizer.json alone, and its config
    assert not (tmp_path / "theirs" / "vocab.json").exists()
    tokenizer = Tokenizer.load(tmp_path / "theirs")
    assert tokenizer.pad_token == "!"
    tokenizer.save(tmp_path / "ours")
    assert (tmp_path / "ours" / "vocab.json").exists()
    assert json.loads((tmp_path / "ours" / "added_tokens.json").read_text())["<toy>"] == 49408
    assert Tokenizer.load(tmp_path / "ours") == tokenizer
    prompts = [*HARD, "a <toy> in Moody-Light moody-light!"]
    same_tokens(tmp_path / "ours", prompts)
    again = CLIPTokenizer.from_pretrained(tmp_path / "ours")
    assert transformers_tokens(again, prompts) == transformers_tokens(theirs, prompts)


def test_a_tokenizer_compares_by_content(two_files):
    loaded, shipped = Tokenizer.load(two_files), Tokenizer.clip()
    assert loaded == shipped and hash(loaded) == hash(shipped) and loaded is not shipped
    assert shipped != Tokenizer.clip("!")
    assert len(repr(shipped)) < 300


def test_what_does_not_fit_is_given_back_in_the_users_own_words():
    tokenizer = Tokenizer.clip()
    words = " ".join(f"Word{'s' * (i % 2)}" for i in range(80))
    cases = {
        "short": "",
        "CAT  " * 75: "",
        "CAT  " * 75 + "The  \u00c9nd": "The  \u00c9nd",
        words: " ".join(words.split()[75:]),
        "x " * 75 + "\N{PARTY POPPER} \u65e5\u672c": "\N{PARTY POPPER} \u65e5\u672c",
    }
    assert tokenizer(list(cases)).dropped == list(cases.values())
    assert tokenizer([]).ids.shape == (0, 77)


def test_what_is_no_text_is_refused():
    tokenizer = Tokenizer.clip()
    with pytest.raises(InputError, match=r"character 3 is the lone surrogate U\+D83D"):
        tokenizer(["ok", "a \ud83d b"])
    with pytest.raises(InputError, match="'pad' must|pad must"):
        Tokenizer.clip("no such token")


BROKEN = {
    "empty folder": ({"vocab": None}, "vocab.json"),
    "no merges": ({"merges": None}, "merges.txt"),
    "not JSON": ({"vocab": "{"}, "vocab.json is not valid JSON"),
    "not UTF-8": ({"vocab": b"\xff\xfe{"}, "vocab.json is not valid JSON"),
    "deep JSON": ({"vocab": "[" * 100_000}, "vocab.json"),
    "a list": ({"vocab": "[]"}, "vocab.json"),
    "a text number": ({"vocab": '{"a": "0"}'}, "numbers must be 0 to 0"),
    "a hole": ({"vocab": '{"a": 0, "b": 7}'}, "numbers must be 0 to 1"),
    "twice": ({"vocab": '{"a": 0, "b": 0}'}, "numbers must be 0 to 1"),
    "huge": ({"vocab": '{"a": 4294967296000}'}, "numbers must be 0 to 0"),
    "infinite": ({"vocab": '{"a": 1e999}'}, "numbers must be"),
    "odd merge": ({"merges": "#version: 0.2\ni n\nt h e\n"}, "merge 2"),
    "unknown merge": ({"merges": "i n\nqq zz\n"}, "merge 2"),
    "latin-1 merges": ({"merges": b"i n\n\xe9 a\n"}, "merges.txt is not UTF-8"),
    "config a list": ({"tokenizer_config": "[1]"}, "tokenizer_config.json"),
    "length": ({"tokenizer_config": '{"model_max_length": -4}'}, "model_max_length"),
    "length text": ({"tokenizer_config": '{"model_max_length": "77"}'}, "model_max_length"),
    "left": ({"tokenizer_config": '{"padding_side": "left"}'}, "padding_side is 'left'"),
    "pad a list": ({"tokenizer_config": '{"pad_token": ["!"]}'}, "a token must be text"),
    "decoder": ({"tokenizer_config": '{"added_tokens_decoder": {"x": {}}}'}, "map numbers"),
    "no content": ({"tokenizer_config": '{"added_tokens_decoder": {"1": {}}}'}, "must be text"),
    "renumbered": ({"added_tokens": '{"<toy>": 50000}'}, "'<toy>' has the id 50000"),
    "added text": ({"added_tokens": '{"<toy>": "x"}'}, "added_tokens.json"),
    "unknown unk": ({"tokenizer_config": '{"unk_token": "<unk>"}'}, "unk_token '<unk>' is not"),
    "tokenizer.json": ({"tokenizer": '{"model": {"type": "Unigram"}}'}, "byte-pair"),
    "no model": ({"tokenizer": "{}"}, "byte-pair"),
    "no vocab": ({"tokenizer": '{"model": {"type": "BPE"}}'}, "vocabulary must map"),
    "added": (
        {"tokenizer": '{"model": {"vocab": {"a": 0}, "merges": []}, "added_tokens": [{}]}'},
        "added_tokens must be a list",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused_naming_the_file(tmp_path, case):
    files, message = BROKEN[case]
    vocab = {"i": 0, "n": 1, "in": 2, "<|startoftext|>": 3, "<|endoftext|>": 4}
    for name, content in ({"vocab": json.dumps(vocab), "merges": "i n\n"} | files).items():
        path = tmp_path / (f"{name}.txt" if name == "merges" else f"{name}.json")
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as refused:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="not a folder"):
        Tokenizer.load(tmp_path / "nowhere")


def test_prompt_files_take_bom_cr_and_blank_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n\r\n  a d\u00f6g\u2028x \n\n\N{CAT}".encode())
    assert read_prompts(path) == ["a cat", "a d\u00f6g\u2028x", "\N{CAT}"]


def test_prompt_files_may_end_their_lines_in_any_way(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"a cat\ra dog\r\r\na bird\na fish\n\r")
    assert read_prompts(path) == ["a cat", "a dog", "a bird", "a fish"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"ok\rfine\r\na\0b", "line 3: a NUL"),
        (b"ok\rna\xefve\r", r"line 2: byte 3 \(0xef\) is not UTF-8"),
        (b"ok\nna\xefve\n", r"prompts.txt, line 2: byte 3 \(0xef\) is not UTF-8"),
        (b"ok\nfine\na\0b", "line 3: a NUL"),
        ("cat\n".encode("utf-16"), "line 1"),
        (b"\xed\xa0\xbd", "line 1"),
        (b"", "no prompts"),
        (b"\xef\xbb\xbf\r\n \n", "no prompts"),
    ],
)
def test_prompt_files_that_are_not_text_are_refused_by_line(tmp_path, data, message):
    path = tmp_path / "prompts.txt"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_prompts(path)


def test_prompt_files_that_cannot_be_read_are_refused(tmp_path):
    for path in (tmp_path / "nowhere.txt", tmp_path, "a\0b"):
        with pytest.raises(InputError):
            read_prompts(path)


def test_tokenizing_imports_no_torch_and_no_transformers():
    code = "import sys; from sdjax.text import Tokenizer; Tokenizer.clip()(['a']);"
    code += "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
