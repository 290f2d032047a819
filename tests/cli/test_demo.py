"""`orthrus demo`: the figures are of the texts shown, and are the same as data."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

import orthrus
from orthrus.cli import common, demo
from orthrus.decode import accept
from orthrus.decode.accept import Verdict
from tests.cli.conftest import Ran

Cli = Callable[..., Ran]


@pytest.mark.parametrize(("plan", "per_text", "per_cycle"), [("full", 0, 2), ("onepass", 1, 1)])
def test_figures_are_of_the_built_in_prompts(
    cli: Cli, model_dir: Path, plan: str, per_text: int, per_cycle: int
) -> None:
    """Both ways' counts among them: a prefill and two passes a cycle, or one."""
    model, tokenizer = orthrus.load(model_dir)
    chats = [[{"role": "user", "content": prompt}] for _, prompt in demo.QUESTIONS[:3]]
    expected = orthrus.generate(model, tokenizer, chats, max_new_tokens=10, plan=plan)
    ran = cli("demo", "-m", model_dir, "--prompts", 3, "--max-new-tokens", 10, "--plan", plan, "--json")
    assert ran.code == 0
    value = json.loads(ran.out)
    assert [(p["kind"], p["prompt"]) for p in value["prompts"]] == list(demo.QUESTIONS[:3])
    for shown, completion in zip(value["prompts"], expected, strict=True):
        assert shown["identical"] is True
        assert shown["orthrus"]["stats"] == completion.stats.to_dict()
        assert shown["tokens_per_cycle"] == completion.stats.tokens_per_cycle
        assert completion.stats.forwards == per_text + per_cycle * completion.stats.cycles
        assert shown["ar"]["stats"]["cycles"] == 0
        speeds = shown["orthrus"]["tokens_per_second"] / shown["ar"]["tokens_per_second"]
        assert shown["speedup"] == pytest.approx(speeds)
    whole = value["all"]
    assert whole["identical"] is True
    assert whole["orthrus"]["stats"]["emitted"] == sum(c.stats.emitted for c in expected)
    assert whole["ar"]["seconds"] == pytest.approx(sum(p["ar"]["seconds"] for p in value["prompts"]))


@pytest.mark.parametrize("command", [("demo", "--prompts", 2), ("generate", "Hello", "--compare")])
def test_no_pass_is_recorded_while_texts_are_timed(
    command: tuple[object, ...], cli: Cli, model_dir: Path, recordings: list[bool]
) -> None:
    """It takes about a second, which the one that meets a kind of pass often would pay for both."""
    assert cli(*command, "-m", model_dir, "--max-new-tokens", 16).code == 0
    assert recordings == [True] * 3


def test_the_terminal_gets_texts_then_one_table_and_a_legend(cli: Cli, model_dir: Path) -> None:
    """Standard output is no terminal here: everything is plain."""
    ran = cli("demo", "-m", model_dir, "--prompts", 2, "--max-new-tokens", 6)
    assert ran.code == 0
    assert "\x1b" not in ran.out
    assert [ran.out.count(word) for word in ("▸ plain decoding", "▸ Orthrus", "accepted drafts")] == [2, 2, 1]
    rows = re.findall(r"^│ (\w+) +│ (yes|no) +│", ran.out, re.MULTILINE)
    assert rows == [("arithmetic", "yes"), ("function", "yes"), ("all", "yes")]


def test_drafts_and_bonus_differ_in_colour_on_a_terminal(
    cli: Cli, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    styles = []
    monkeypatch.setattr(demo, "say", lambda text, style="", **_: styles.append(style))
    assert cli("demo", "-m", model_dir, "--prompts", 1, "--max-new-tokens", 6).code == 0
    assert styles.index(demo.BONUS) + 1 == styles.index(demo.DRAFT)  # the first token, then drafts
    assert demo.DRAFT not in styles[: styles.index("dim")], "plain decoding has neither"


def test_a_terminal_is_spared_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    """A model may write anything; what is piped stays as it is."""

    def terminal() -> Console:
        return Console(force_terminal=True, color_system=None)

    text = "a\x1b]0;title\x07\tb\r\n\x9b2J [bold]" + "wide " * 100
    common.say(text, to=terminal)
    assert capsys.readouterr().out == "a�]0;title�\tb�\n�2J [bold]" + "wide " * 100 + "\n"
    common.say(text)
    assert capsys.readouterr().out == text + "\n"


@pytest.mark.parametrize(("dtype", "code"), [("float32", 1), ("bfloat16", 0)])
def test_a_broken_promise_fails_in_float32(
    cli: Cli, model_dir: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, code: int
) -> None:
    """Acceptance is broken on purpose: every draft is taken."""

    def gullible(draft_BM, score_BM1V):  # type: ignore[no-untyped-def]
        own = greedy(draft_BM, score_BM1V)
        own.tokens_BM1[:, :-1] = draft_BM
        return Verdict(own.tokens_BM1, own.accepted_B * 0 + draft_BM.shape[1])

    greedy = accept.greedy
    monkeypatch.setattr(accept, "greedy", gullible)
    ran = cli(
        "demo", "-m", model_dir, "--prompts", 1, "--max-new-tokens", 16, "--json", "--dtype", dtype, "--plan", "full"
    )
    assert ran.code == code
    assert json.loads(ran.out)["all"]["identical"] is False


def test_bad_options_end_before_a_model_is_loaded(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "load", lambda *_, **__: pytest.fail("loaded"))
    assert cli("demo", "--max-new-tokens", 0).code == 2
    assert cli("demo", "--plan", "wild").code == 2
    assert cli("demo", "--prompts", 0).code == 2
