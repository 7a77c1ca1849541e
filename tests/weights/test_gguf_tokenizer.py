"""Tokenizers rebuilt from GGUF, against naive implementations of the two algorithms."""

import pytest
import regex
from gguf_writing import byte_level_vocabulary, write_metadata
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from jaxserve.errors import TokenizerError
from jaxserve.weights.gguf_file import GGUFFile
from jaxserve.weights.gguf_tokenizer import gguf_eos_ids, gguf_tokenizer
from jaxserve.weights.pretokenizers import PRE_TOKENIZERS

MERGES = ["l l", "h e", "he ll", "hell o", "1 2", "12 3", "\u0120 w", "\u0120w o", "o r", "\u0120 \u0120"]


def tokenizer_of(tmp_path, values):
    return gguf_tokenizer(GGUFFile(write_metadata(tmp_path / "tokenizer.gguf", values)))


def byte_level(tmp_path, pre="smollm", specials=("<|end|>",), **values):
    vocabulary = byte_level_vocabulary(MERGES, specials)
    return tokenizer_of(tmp_path, vocabulary | {"tokenizer.ggml.pre": pre} | values)


# What each rule makes of contractions, digits, runs of spaces, newlines and letters with accents.
TEXT = "I'VE it's 12345 caf\u00e9--x\n\n  y \u00b2"
PIECES = {
    "gpt-2": "I|'|VE| it|'s| 12345| caf\u00e9|--|x|\n\n | y| \u00b2",
    "smollm": "I|'|VE| it|'s| |1|2|3|4|5| caf\u00e9|--|x|\n\n | y| |\u00b2",
    "llama-bpe": "I|'VE| it|'s| |123|45| caf\u00e9|--|x|\n\n| | y| |\u00b2",
    "qwen2": "I|'VE| it|'s| |1|2|3|4|5| caf\u00e9|--|x|\n\n| | y| |\u00b2",
    "tekken": "I|'VE| it|'s| |1|2|3|4|5| caf\u00e9|--|x|\n\n| | y| |\u00b2",
    "default": "I|'|VE| it|'|s| |123|45| caf\u00e9|--|x|\n\n | y| |\u00b2",
}


@pytest.mark.parametrize("pre", PIECES)
def test_each_rule_splits_as_it_should(pre):
    pieces = PRE_TOKENIZERS[pre].pre_tokenizer().pre_tokenize_str(TEXT)
    assert "|".join(TEXT[start:end] for _, (start, end) in pieces) == PIECES[pre]


def test_names_of_the_same_rule():
    assert PRE_TOKENIZERS["llama3"] is PRE_TOKENIZERS["llama-v3"] is PRE_TOKENIZERS["llama-bpe"]
    assert PRE_TOKENIZERS["starcoder"] is PRE_TOKENIZERS["refact"] is PRE_TOKENIZERS["smollm"]


def naive_byte_level(text, tokens, merges):
    """Split digits off, then GPT-2's words, then merge bytes by rank, one pair at a time."""
    words = []
    for piece in regex.findall(r"\p{N}|\P{N}+", text):
        pattern = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
        words += regex.findall(pattern, piece)
    (ranks, ids) = ({tuple(m.split(" ")): i for i, m in enumerate(merges)}, {t: i for i, t in enumerate(tokens)})
    table = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found = []
    for word in words:
        parts = list(table.pre_tokenize_str(word)[0][0])
        while True:
            ranked = [(ranks[pair], i) for i, pair in enumerate(zip(parts, parts[1:], strict=False)) if pair in ranks]
            if not ranked:
                break
            _, i = min(ranked)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        found += [ids[part] for part in parts]
    return found


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    return byte_level(tmp_path_factory.mktemp("smollm"))


@settings(deadline=None)
@given(text=st.text(alphabet="helo wr123'\n\u00e9\u00b2\u3000", max_size=30))
def test_ids_equal_a_naive_byte_level_bpe(smollm, text):
    vocabulary = byte_level_vocabulary(MERGES, ("<|end|>",))
    assert smollm.encode(text) == naive_byte_level(text, vocabulary["tokenizer.ggml.tokens"], MERGES)
    assert smollm.decode(smollm.encode(text)) == text


def test_control_tokens_are_special_and_found_in_text(tmp_path):
    tokenizer = byte_level(tmp_path, specials=("<|end|>", "<|im_end|>"), **{"tokenizer.ggml.eos_token_id": 266})
    ids = tokenizer.encode("hello<|end|>")
    assert ids[-1] == tokenizer.eos_token_id == 266
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello"
    assert tokenizer.decode(ids) == "hello<|end|>"


def test_end_of_turn_tokens_end_an_answer_too(tmp_path):
    vocabulary = byte_level_vocabulary(MERGES, ("<eos>", "<stop>", "<|im_end|>"))
    values = vocabulary | {"tokenizer.ggml.eos_token_id": 266, "tokenizer.ggml.eot_token_id": 267}
    assert gguf_eos_ids(GGUFFile(write_metadata(tmp_path / "t.gguf", values))) == (266, 267, 268)


@pytest.mark.parametrize(
    ("pre", "stated", "expected"),
    [("smollm", None, False), ("smollm", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False)],
)
def test_bos_comes_first_where_the_file_or_the_rule_says_so(tmp_path, pre, stated, expected):
    values = {"tokenizer.ggml.bos_token_id": 266} | ({} if stated is None else {"tokenizer.ggml.add_bos_token": stated})
    ids = byte_level(tmp_path, pre, **values).encode("hello")
    assert ids == ([266] if expected else []) + [259]


def test_eos_comes_last_where_the_file_says_so(tmp_path):
    values = {"tokenizer.ggml.eos_token_id": 266, "tokenizer.ggml.add_eos_token": True}
    assert byte_level(tmp_path, **values).encode("hello") == [259, 266]


def test_llama3_takes_whole_words_without_merging(tmp_path):
    """ignore_merges: a piece that is a token is taken as it stands, though no merge leads there."""
    vocabulary = byte_level_vocabulary(MERGES, ())
    tokens = [*vocabulary["tokenizer.ggml.tokens"], "xyz"]
    values = vocabulary | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * len(tokens)}
    assert tokenizer_of(tmp_path, values | {"tokenizer.ggml.pre": "llama-bpe"}).encode("xyz") == [266]
    assert len(tokenizer_of(tmp_path, values | {"tokenizer.ggml.pre": "smollm"}).encode("xyz")) == 3


def test_qwen2_normalises_to_nfc(tmp_path):
    tokenizer = byte_level(tmp_path, "qwen2")
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")


def test_chat_templates(tmp_path):
    plain = byte_level(tmp_path, **{"tokenizer.chat_template": "{{ messages[0]['content'] }}!"})
    assert plain.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
    named = {"tokenizer.chat_template": "a", "tokenizer.chat_template.tool_use": "b"}
    assert byte_level(tmp_path, **named).chat_template == {"default": "a", "tool_use": "b"}
    assert byte_level(tmp_path).chat_template is None


# SentencePiece: pieces with scores; the longer the merge, the later it was learnt.
PIECES_SPM = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
WORDS = ["\u2581", "a", "b", "c", "ab", "\u2581a", "bc", "abc", "\u2581ab", "ca", "\u2581c", "\u2581\u2581", "cab"]


def spm_values(add_space_prefix=True, **values):
    scores = [0.0] * len(PIECES_SPM) + [-float(i) for i in range(len(WORDS))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": PIECES_SPM + WORDS,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(WORDS),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": add_space_prefix,
    } | values


def naive_sentence_piece(text, prefix):
    """Join the neighbours whose union has the best score, leftmost first; unknown characters become bytes."""
    scores = {word: -i for i, word in enumerate(WORDS)}
    parts = list((("\u2581" if prefix and text else "") + text).replace(" ", "\u2581"))
    while True:
        joins = [(-scores[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in scores]
        if not joins:
            break
        _, i = min(joins)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    base = len(PIECES_SPM)
    return [
        token_id
        for part in parts
        for token_id in ([base + WORDS.index(part)] if part in scores else [3 + byte for byte in part.encode()])
    ]


@pytest.fixture(scope="module", params=[True, False], ids=["prefix", "bare"])
def spm(request, tmp_path_factory):
    return request.param, tokenizer_of(tmp_path_factory.mktemp("spm"), spm_values(request.param))


@settings(deadline=None)
@given(text=st.text(alphabet="abc \n\u00e9", max_size=20))
def test_ids_equal_a_naive_sentence_piece(spm, text):
    prefix, tokenizer = spm
    ids = tokenizer.encode(text)
    assert ids == [1, *naive_sentence_piece(text, prefix)]  # BOS is the format's default
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_user_defined_tokens_are_found_first(tmp_path):
    values = spm_values(False, **{"tokenizer.ggml.add_bos_token": False})
    values["tokenizer.ggml.tokens"] = [*PIECES_SPM, *WORDS, "<tool>"]
    values["tokenizer.ggml.scores"] = [*values["tokenizer.ggml.scores"], -1000.0]
    values["tokenizer.ggml.token_type"] = [*values["tokenizer.ggml.token_type"], 4]
    tokenizer = tokenizer_of(tmp_path, values)
    ids = tokenizer.encode("ab<tool>c")
    assert ids == [263, 259 + len(WORDS), 262]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab<tool>c"  # not special: it stays in the text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokenizer.ggml.pre": "brand-new"}, "is 'brand-new', which isn't known .known: default, gpt-2, smollm"),
        ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre of .* is missing"),
        ({"tokenizer.ggml.model": "bert"}, "is 'bert'; known: gpt2, llama"),
        ({"tokenizer.ggml.model": None}, "holds no tokenizer"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "267 tokens and 2 token types"),
        ({"tokenizer.ggml.eos_token_id": 267}, "eos_token_id of .* is 267; expected 0 to 266"),
        ({"tokenizer.ggml.merges": ["h e", "no merge"]}, "merge 'no merge' of .* isn't made of known tokens"),
        ({"tokenizer.ggml.merges": ["single"]}, "merge 'single'"),
        ({"tokenizer.ggml.model": "llama"}, "no score for each of its 267 tokens"),
    ],
)
def test_what_is_wrong_is_a_tokenizer_error(tmp_path, values, message):
    merged = byte_level_vocabulary(MERGES, ("<|end|>",)) | {"tokenizer.ggml.pre": "smollm"} | values
    with pytest.raises(TokenizerError, match=message):
        tokenizer_of(tmp_path, {key: value for key, value in merged.items() if value is not None})


def test_a_token_twice_is_refused(tmp_path):
    with pytest.raises(TokenizerError, match="1 tokens twice"):
        byte_level(tmp_path, specials=("<|end|>", "<|end|>"))


def test_the_weights_of_a_file_with_an_unknown_tokenizer_may_still_be_used(tmp_path):
    file = GGUFFile(write_metadata(tmp_path / "t.gguf", {"tokenizer.ggml.model": "bert"}))
    assert gguf_eos_ids(file) == ()
