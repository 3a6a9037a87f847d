"""Text as it grows is the text of the whole, cut before a stop string."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from t2.server.text import GrowingText


@pytest.fixture(scope="module")
def by_bytes() -> PreTrainedTokenizerFast:
    """A token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=words)


TEXTS = ["plain words, and more", "déjà vu — naïve ☃ 🎉🎊 end", " leading", "a\n\nb\tc", "日本語のテキスト", "🎉"]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_the_whole_and_are_whole_characters(by_bytes, text):
    growing = GrowingText(by_bytes)
    pieces = [growing.add(token) for token in by_bytes(text)["input_ids"]]
    assert "".join(pieces) + growing.end() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_at_the_end(by_bytes):
    growing, ids = GrowingText(by_bytes), by_bytes("a🎉")["input_ids"]
    assert "".join(growing.add(token) for token in ids[:-1]) == "a"
    assert set(growing.end()) == {"\ufffd"}


@pytest.mark.parametrize("text", TEXTS)
def test_any_stop_string_ends_the_text_before_it(by_bytes, text):
    ids = by_bytes(text)["input_ids"]
    for start in range(len(text)):
        for end in range(start + 1, min(len(text), start + 4) + 1):
            stop = text[start:end]
            growing, given = GrowingText(by_bytes, ["never", stop]), ""
            for token in ids:
                given += growing.add(token)
                assert text.startswith(given) and stop not in given
                if growing.stopped:
                    break
            assert growing.stopped and given == text[: text.index(stop)] and growing.end() == ""


def test_what_only_might_have_been_a_stop_string_is_given_in_the_end(by_bytes):
    growing = GrowingText(by_bytes, ["stop!"])
    given = "".join(growing.add(token) for token in by_bytes("do not sto")["input_ids"])
    assert given == "do not " and given + growing.end() == "do not sto"
