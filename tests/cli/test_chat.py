"""`orthrus chat`: answers are the model's own, the cache is kept, and every way out is clean."""

import io
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import orthrus
from orthrus.cli import chat
from orthrus.cli.chat import Conversation
from orthrus.decode import accept
from orthrus.decode.accept import Verdict
from orthrus.decode.api import encode
from orthrus.decode.passes import Passes
from tests.cli.conftest import CONTEXT, Ran

Cli = Callable[..., Ran]
Say = Callable[..., Ran]


@pytest.fixture
def talk(cli: Cli, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Say:
    """Type some lines at `orthrus chat`, then end the input."""

    def say(*lines: str, options: tuple[object, ...] = ("--max-new-tokens", 6)) -> Ran:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        return cli("chat", "-m", model_dir, *options)

    return say


def conversation(model_dir: Path, *, window: int = CONTEXT, mode: str = "orthrus") -> tuple[Conversation, Any, Any]:
    model, tokenizer = orthrus.load(model_dir)
    options = {"max_new_tokens": 8, "do_sample": False}
    made = Conversation(model, tokenizer, mode=mode, plan=None, exact="distribution", window=window, options=options)
    return made, model, tokenizer


def ask(made: Conversation, text: str) -> list[int]:
    return [token for chunk in made.ask(text, stopped=lambda: False) for token in chunk.token_ids]


@pytest.mark.parametrize("mode", ["orthrus", "ar"])
def test_every_answer_is_what_the_whole_chat_gives_anew(model_dir: Path, mode: str) -> None:
    """Keys kept from turn to turn change nothing: each answer equals a stateless call on the same chat."""
    made, model, tokenizer = conversation(model_dir, mode=mode)
    made.system = "Be brief."
    for text in ("One", "Two", "Three"):
        prompt = [
            {"role": "system", "content": "Be brief."},
            *made.messages,
            {"role": "user", "content": text},
        ]
        [expected] = orthrus.generate(model, tokenizer, prompt, max_new_tokens=8)
        assert ask(made, text) == expected.token_ids
    assert [m["role"] for m in made.messages] == ["user", "assistant"] * 3


def test_only_new_tokens_are_read(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second turn prefills what differs from the first prompt and answer, and nothing before it."""
    made, _, tokenizer = conversation(model_dir)
    read: list[int] = []
    prefill = Passes.prefill

    def counting(self: Passes, rows: slice, pending: Any, **how: Any) -> Tensor | None:
        read.extend(map(len, pending))
        return prefill(self, rows, pending, **how)

    monkeypatch.setattr(Passes, "prefill", counting)
    first = encode(tokenizer, [{"role": "user", "content": "One"}])
    cached = first + ask(made, "One")
    second = encode(tokenizer, [*made.messages, {"role": "user", "content": "Two"}])
    ask(made, "Two")
    common = next(i for i, (a, b) in enumerate(zip(cached, second, strict=False)) if a != b)
    assert common >= len(first) - 1
    assert read == [len(first) - 1, len(second) - 1 - common]


def test_a_session_prints_answers_and_keeps_remarks_apart(talk: Say, model_dir: Path) -> None:
    model, tokenizer = orthrus.load(model_dir)
    chunks = orthrus.stream(model, tokenizer, [{"role": "user", "content": "Hello"}], max_new_tokens=6)
    text = "".join(chunk.text for chunk in chunks)
    ran = talk(
        "/stats",
        "Hello",
        "/stats",
        "",
        "/system Be kind.",
        "/help",
        "/sats",
        "/reset",
        "/stats",
        "/quit",
        "x",
    )
    assert (ran.code, ran.out) == (0, text + "\n")
    assert ran.err.count("nothing has been said yet") == 2, "before the first answer, and after /reset"
    assert "last answer: 6 tokens" in ran.err
    assert "conversation: 6 tokens" in ran.err
    assert "system message: Be kind." in ran.err
    assert "did you mean /stats?" in ran.err
    assert "/quit         end" in ran.err


def test_the_end_of_the_input_ends_the_chat(talk: Say) -> None:
    assert talk().code == 0


def test_ctrl_c_ends_the_answer_and_keeps_the_conversation(talk: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal arrives in the middle of the second pass; the cycle is finished, the answer is not."""
    calls = []

    def pressing(draft_BM: Tensor, score_BM1V: Tensor) -> Verdict:
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return greedy(draft_BM, score_BM1V)

    greedy = accept.greedy
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(accept, "greedy", pressing)
    ran = talk("Hello", "/stats", "Again", options=("--max-new-tokens", 40))
    assert ran.code == 0
    assert ran.err.count("interrupted; the conversation goes on") == 1
    assert "conversation: 40 tokens" not in ran.err
    assert len(calls) > 4, "the second question was answered"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_ends_the_chat(talk: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressing(*_: object) -> Verdict:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second signal interrupts at once")

    monkeypatch.setattr(accept, "greedy", pressing)
    ran = talk("Hello")
    assert ran.code == 130
    assert ran.err.endswith("\ninterrupted\n")


def test_a_conversation_that_outgrows_its_window_says_so_and_can_begin_anew(talk: Say) -> None:
    ran = talk("Hello", "word " * 80, "/reset", "Hello", options=("--max-new-tokens", 6, "--window", 64))
    assert ran.code == 0
    assert "there is room for 64: /reset begins anew" in ran.err
    first, again = ran.out.splitlines()
    assert first == again


def test_an_answer_fits_into_what_is_left_of_the_window(model_dir: Path) -> None:
    """The last token of the window is written, and not one more."""
    _, _, tokenizer = conversation(model_dir)
    length = len(encode(tokenizer, [{"role": "user", "content": "Hello"}]))
    made, _, _ = conversation(model_dir, window=length + 3)
    assert len(ask(made, "Hello")) == 3


def test_bad_options_end_before_a_model_is_loaded(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat.common, "load", lambda *_, **__: pytest.fail("loaded"))
    ran = cli("chat", "--top-p", 0)
    assert (ran.code, ran.out) == (2, "")
    assert "top_p: Input should be greater than 0" in ran.err


def test_a_model_without_a_template_cannot_chat(model_dir: Path) -> None:
    _, model, tokenizer = conversation(model_dir)
    tokenizer.chat_template = None
    with pytest.raises(orthrus.errors.PromptError, match="a chat needs a tokenizer with a chat template"):
        Conversation(model, tokenizer, mode="ar", plan=None, exact="distribution", window=64, options={})
