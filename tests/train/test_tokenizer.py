"""The trained tokenizer: lossless on any text, single digits, ChatML, and the same after saving."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from orthrus.data.documents import Document
from orthrus.errors import ConfigError
from orthrus.train.tokenizer import SPECIAL_TOKENS, train_tokenizer, training_texts

TEXTS = ["Ana has 12 red apples.\nThe answer is 12.", "def add(a, b):\n    return a + b\n"] * 3
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2"},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, vocab_size=280, max_length=512)


@settings(max_examples=50, deadline=None)
@given(text=st.text().filter(lambda text: not any(token in text for token in SPECIAL_TOKENS)))
def test_any_text_comes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    """Byte-level: decoding undoes encoding, whatever was seen in training."""
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_come_first_and_have_their_roles(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3]
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.mask_token) == (
        "<|endoftext|>",
        "<|im_end|>",
        "<|mask|>",
    )
    assert len(tokenizer) == 280


def test_every_digit_is_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("12.345") == ["1", "2", ".", "3", "4", "5"]


def test_chat_template_is_chatml(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>\n"
    assert (
        tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
        == text + "<|im_start|>assistant\n"
    )
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == text + "<|im_start|>assistant\n2<|im_end|>\n"


def test_training_is_reproducible(tokenizer: PreTrainedTokenizerFast) -> None:
    again = train_tokenizer(TEXTS, vocab_size=280, max_length=512)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_saved_tokenizers_load_equal(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    for loaded in (PreTrainedTokenizerFast.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded.apply_chat_template(CHAT, return_dict=False) == tokenizer.apply_chat_template(
            CHAT, return_dict=False
        )
        assert loaded.eos_token_id == tokenizer.eos_token_id
        assert loaded.mask_token_id == tokenizer.mask_token_id


def test_too_little_text_for_the_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size: 5000 entries are required"):
        train_tokenizer(["a"], vocab_size=5000, max_length=8)


def test_training_texts_stop_at_the_budget() -> None:
    documents = [Document(source="s", text="abc"), Document(source="s", messages=tuple(CHAT))]
    assert training_texts(documents, characters=3) == ["abc"]
    assert training_texts(documents, characters=4) == ["abc", "Be brief.", "1 + 1?", "2"]
