"""Incremental text equals the text decoded at once, at constant cost a token."""

from types import SimpleNamespace

import pytest
from fakes import BOS, EOS, ByteTokenizer, fast_byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.text.codec import Codec
from jaxserve.text.detokenizer import MAX_WINDOW, Detokenizer, decode_output

PROMPT = list(b"a prompt: ")
CODECS = {"plain": Codec(ByteTokenizer()), "fast": Codec(fast_byte_tokenizer())}


def pieces(codec, prompt, ids, **kwargs):
    detokenizer = Detokenizer(codec, prompt, **kwargs)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


def sentencepiece_codec():
    """Llama 2's kind: "▁" for spaces, bytes as "<0x..>" tokens, and the first space of a text dropped."""
    from tokenizers import Tokenizer, decoders, models

    words = ["<unk>", "▁", "▁The", "▁capital", "s", "▁Paris", "é"] + [f"<0x{b:02X}>" for b in range(256)]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Codec(SimpleNamespace(backend_tokenizer=tokenizer)), {w: i for i, w in enumerate(words)}


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())
@settings(max_examples=200, deadline=None)
@given(text=st.text(min_size=1, max_size=40))
def test_pieces_of_text_join_to_the_text_and_none_holds_half_a_character(codec, text):
    got = pieces(codec, PROMPT, text.encode())
    assert "".join(got) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in got)


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())
@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=80))
def test_pieces_of_any_bytes_equal_the_text_decoded_at_once(codec, data):
    assert "".join(pieces(codec, PROMPT, data)) == data.decode(errors="replace")
    assert decode_output(codec, PROMPT, data) == data.decode(errors="replace")


def test_a_character_that_prompt_and_output_share_belongs_to_the_output():
    half, rest = "é".encode()[:1], "é!".encode()[1:]
    for codec in CODECS.values():
        assert "".join(pieces(codec, half, rest)) == "é!"
        assert decode_output(codec, half, rest) == "é!"


def test_every_token_of_complete_text_is_handed_out_at_once():
    assert pieces(CODECS["fast"], PROMPT, b"hello") == ["h", "e", "l", "l", "o", ""]


def test_special_tokens_are_skipped_or_kept():
    ids = [*b"a", EOS, *b"b", BOS]
    codec = CODECS["fast"]
    assert "".join(pieces(codec, PROMPT, ids)) == "ab"
    assert "".join(pieces(codec, PROMPT, ids, skip_special_tokens=False)) == "a<eos>b<bos>"


@pytest.mark.parametrize("ids", [[0xFF] * 400, [EOS] * 400, list(b"ab" * 200)], ids=["garbage", "special", "text"])
def test_the_cost_of_a_token_doesnt_grow_with_the_text(ids):
    longest = 0

    class Counting(Codec):
        def decode(self, token_ids, *, skip_special_tokens=False):
            nonlocal longest
            longest = max(longest, len(token_ids))
            return super().decode(token_ids, skip_special_tokens=skip_special_tokens)

    codec = Counting(ByteTokenizer())
    got = "".join(pieces(codec, PROMPT, ids))
    assert longest <= MAX_WINDOW + 10
    assert got == codec.decode(ids, skip_special_tokens=True)


def test_the_first_word_after_a_prompt_keeps_its_space():
    codec, ids = sentencepiece_codec()
    prompt = [ids["▁The"], ids["▁capital"]]
    output = [ids["▁Paris"], ids["s"], ids["▁"], ids["▁Paris"]]
    assert pieces(codec, prompt, output) == [" Paris", "s", " ", " Paris", ""]
    assert decode_output(codec, prompt, output) == " Pariss  Paris"


def test_byte_fallback_characters_come_out_whole():
    codec, ids = sentencepiece_codec()
    emoji = [ids[f"<0x{b:02X}>"] for b in "😀".encode()]
    euro = [ids[f"<0x{b:02X}>"] for b in "€".encode()]
    got = pieces(codec, [ids["▁The"]], [ids["▁Paris"], *euro, *emoji, ids["s"], *emoji])
    assert "".join(got) == " Paris€😀s😀"
    assert not any("\ufffd" in piece for piece in got)


def test_an_unfinished_character_is_flushed_as_a_replacement():
    assert pieces(CODECS["fast"], PROMPT, "x€".encode()[:-1]) == ["x", "", "", "\ufffd"]


def test_no_tokens_no_text():
    assert pieces(CODECS["fast"], PROMPT, []) == [""]
    assert decode_output(CODECS["fast"], PROMPT, []) == ""
