"""Packed rows: whole documents, right masks, and files that are complete or refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from orthrus.data.documents import Document
from orthrus.data.packing import (
    NO_DOCUMENT,
    EncodedDocument,
    PackedRows,
    encode_documents,
    load_rows,
    pack,
    save_rows,
)
from orthrus.errors import DataError
from orthrus.train.tokenizer import train_tokenizer

PAD = 0
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How many apples?"},
    {"role": "assistant", "content": "12 apples.\n\nYes"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": " 12\n"},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["How many apples? 12 apples. Sure?"] * 2, vocab_size=270, max_length=512)


def numbered(lengths: list[int]) -> list[EncodedDocument]:
    """Documents with token ids that name the document and the place in it."""
    return [
        EncodedDocument(
            token_ids=np.arange(length, dtype=np.int32) + 1_000 * (number + 1),
            answer=np.arange(length) % 2 == 0,
        )
        for number, length in enumerate(lengths)
    ]


def unpacked(rows: PackedRows) -> list[list[int]]:
    """The documents of all rows, as lists of token ids."""
    return [
        ids[document == index].tolist()
        for ids, document in zip(rows.token_ids, rows.document, strict=True)
        for index in range(document.max() + 1)
    ]


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=60).filter(any),
    row_tokens=st.integers(1, 24),
    window=st.integers(1, 64),
)
def test_every_document_is_in_one_row_whole_or_cut_at_the_row(lengths: list[int], row_tokens: int, window: int) -> None:
    documents = numbered(lengths)
    rows = pack(documents, row_tokens=row_tokens, pad_id=PAD, window=window)
    expected = [document.token_ids[:row_tokens].tolist() for document in documents if len(document.token_ids)]
    assert sorted(unpacked(rows)) == sorted(expected)
    padding = rows.document == NO_DOCUMENT
    assert (rows.token_ids[padding] == PAD).all()
    assert not rows.answer[padding].any()
    assert (rows.position[~padding] == rows.token_ids[~padding] % 1_000).all()
    assert (rows.answer[~padding] == (rows.position[~padding] % 2 == 0)).all()


def test_best_fit_fills_rows() -> None:
    rows = pack(numbered([5, 3, 6, 2, 4, 4]), row_tokens=8, pad_id=PAD)
    assert len(rows) == 3
    assert (rows.document != NO_DOCUMENT).all()


def test_packing_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="at least one document"):
        pack(numbered([0, 0]), row_tokens=8, pad_id=PAD)


def test_answers_are_the_assistant_turns_with_their_end_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    [encoded] = encode_documents(tokenizer, [Document(source="s", messages=tuple(TURNS))])
    parts = np.split(encoded.token_ids, np.flatnonzero(np.diff(encoded.answer.astype(int))) + 1)
    texts = [tokenizer.decode(part) for part in parts]
    assert texts[1::2] == ["12 apples.\n\nYes<|im_end|>", " 12\n<|im_end|>"]
    assert texts[0].endswith("<|im_start|>assistant\n")
    assert texts[2] == "\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"


@settings(max_examples=100, deadline=None)
@given(contents=st.lists(st.text(alphabet="ab1 .,\n's<|", max_size=12), min_size=2, max_size=6))
def test_segments_encode_as_the_decoder_sees_them(tokenizer: PreTrainedTokenizerFast, contents: list[str]) -> None:
    """The tokens before an answer are those of the rendered prompt, as generation is given it."""
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    [encoded] = encode_documents(tokenizer, [Document(source="s", messages=tuple(messages))])
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert encoded.token_ids[: len(prompt)].tolist() == prompt
    assert not encoded.answer[: len(prompt)].any()
    assert encoded.answer[len(prompt)]


def test_segment_wise_encoding_equals_whole_encoding(tokenizer: PreTrainedTokenizerFast) -> None:
    """Special tokens and newlines part the segments, so that nothing merges across them."""
    messages = [{"role": m["role"], "content": m["content"].strip()} for m in TURNS]
    [encoded] = encode_documents(tokenizer, [Document(source="s", messages=tuple(messages))])
    whole = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
    assert encoded.token_ids.tolist() == tokenizer(whole)["input_ids"]


def test_texts_end_with_the_end_token_and_have_no_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    [encoded] = encode_documents(tokenizer, [Document(source="s", text="many apples")])
    assert tokenizer.decode(encoded.token_ids) == "many apples<|im_end|>"
    assert not encoded.answer.any()


def test_tools_that_the_template_does_not_present_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = Document(source="s", messages=tuple(TURNS), tools=({"name": "f"},), origin="x.jsonl:1")
    with pytest.raises(DataError, match=r"x\.jsonl:1: tools were given, but this tokenizer's chat template presents"):
        list(encode_documents(tokenizer, [chat]))


def test_a_chat_without_an_answer_is_all_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    [encoded] = encode_documents(tokenizer, [Document(source="s", messages=tuple(TURNS[:2]))])
    assert tokenizer.decode(encoded.token_ids) == tokenizer.apply_chat_template(TURNS[:2], tokenize=False)
    assert not encoded.answer.any()


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    rewriting = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="<|im_end|>",
        chat_template="{{ messages|length }}{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}",
    )
    with pytest.raises(DataError, match="rewrites it"):
        list(encode_documents(rewriting, [Document(source="s", messages=tuple(TURNS))]))


def test_saved_rows_load_equal_and_memory_mapped(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = pack(numbered([5, 3, 6]), row_tokens=8, pad_id=PAD)
    about = {"sources": ["a"], "seed": 1}
    save_rows(rows, tmp_path / "rows", tokenizer=tokenizer, about=about)
    loaded = load_rows(tmp_path / "rows", tokenizer=tokenizer, about=about)
    for name in ("token_ids", "document", "position", "answer"):
        array = getattr(loaded, name)
        assert isinstance(array, np.memmap)
        np.testing.assert_array_equal(array, getattr(rows, name), strict=True)
    manifest = json.loads((tmp_path / "rows" / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["rows"], manifest["documents"], manifest["tokens"]) == (2, 3, 14)
    assert manifest["answer_tokens"] == int(rows.answer.sum())
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


def test_rows_that_do_not_belong_are_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    save_rows(pack(numbered([5]), row_tokens=8, pad_id=PAD), path, tokenizer=tokenizer, about={"seed": 1})
    other = train_tokenizer(["quite other words"], vocab_size=265, max_length=8)
    with pytest.raises(DataError, match="another tokenizer"):
        load_rows(path, tokenizer=other)
    with pytest.raises(DataError, match="other data than the recipe names"):
        load_rows(path, tokenizer=tokenizer, about={"seed": 2})
    with (path / "answer.npy").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x07")
    with pytest.raises(DataError, match=r"damaged .*: answer"):
        load_rows(path, tokenizer=tokenizer)
    (path / "position.npy").unlink()
    with pytest.raises(DataError, match="complete packed set"):
        load_rows(path, tokenizer=tokenizer)
