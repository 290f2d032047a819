"""`orthrus generate`: the texts are the API's, the comparison is honest, and bad input gets a clear end."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import orthrus
from orthrus.cli.generate import means
from orthrus.decode import accept, api
from orthrus.decode.accept import Verdict
from orthrus.decode.output import Stats
from orthrus.peers import dflash_files
from orthrus.peers.dflash import DFlash, DFlashConfig
from tests.cli.conftest import CONTEXT, Ran
from tests.families import tiny

Cli = Callable[..., Ran]
STATISTICS = {
    "cycles", "forwards", "plain_steps", "first_tokens", "drafted", "accepted", "emitted",
    "tokens_per_forward", "acceptance_length", "tokens_per_cycle", "accepted_per_position",
}  # fmt: skip


def answered(ran: Ran, code: int = 0) -> dict[str, Any]:
    """The one JSON object that a command printed."""
    assert ran.code == code, ran.err
    value = json.loads(ran.out)
    assert isinstance(value, dict)
    return value


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Four prompts of different lengths, the last one with two turns."""
    records: list[dict[str, Any]] = [{"id": f"q/{n}", "prompt": "What is it? " * n} for n in (1, 4, 2)]
    records.append({"id": "q/chat", "messages": [{"role": "user", "content": c} for c in ("One?", "Two?")]})
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def test_the_text_is_the_apis_and_statistics_stay_off_standard_output(cli: Cli, model_dir: Path) -> None:
    model, tokenizer = orthrus.load(model_dir)
    [expected] = orthrus.generate(model, tokenizer, [{"role": "user", "content": "Tell me."}], max_new_tokens=12)
    ran = cli("generate", "Tell me.", "--model", model_dir, "--max-new-tokens", 12)
    assert (ran.code, ran.out) == (0, expected.text + "\n")
    assert "12 tokens" in ran.err
    assert "tokens per forward" in ran.err


def test_another_drafter_drafts_for_a_model_with_a_view_or_without(cli: Cli, model_dir: Path, tmp_path: Path) -> None:
    """The text is the same, and its statistics name who drafted."""
    model, tokenizer = orthrus.load(model_dir)
    [expected] = orthrus.generate(model, tokenizer, "Tell me.", max_new_tokens=9, mode="ar")
    drafter, plain = tmp_path / "drafter", tmp_path / "plain"
    drafter.mkdir()
    dflash_files.save(DFlash(DFlashConfig.of(model, layers=1, taps=(0,), block_size=4, mask_token_id=1)), drafter)
    orthrus.detach(model).save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    for folder in (model_dir, plain):
        name = f"dflash:{drafter}"
        ran = cli(
            "generate",
            "Tell me.",
            "-m",
            folder,
            "--drafter",
            name,
            "--plan",
            "full",
            "--max-new-tokens",
            9,
            "--raw",
            "--json",
        )
        [completion] = answered(ran)["completions"]
        assert completion["token_ids"] == expected.token_ids
        assert completion["stats"]["draft_passes"] == {"dflash": completion["stats"]["cycles"]}


def test_raw_continues_the_text_as_it_is(cli: Cli, model_dir: Path) -> None:
    model, tokenizer = orthrus.load(model_dir)
    [expected] = orthrus.generate(model, tokenizer, "Tell me.", max_new_tokens=12)
    ran = cli("generate", "Tell me.", "-m", model_dir, "--max-new-tokens", 12, "--raw", "--json")
    [completion] = answered(ran)["completions"]
    assert (completion["prompt"], completion["token_ids"]) == ("Tell me.", expected.token_ids)


def test_tools_of_a_prompt_set_reach_the_template_or_are_refused(cli: Cli, model_dir: Path, tmp_path: Path) -> None:
    """A chat that ends in a tool's result is answered from there; the tiny model's template presents no tools."""
    chat = [{"role": "user", "content": "6 * 7?"}, {"role": "tool", "tool_call_id": "1", "content": "42"}]
    file = tmp_path / "tools.jsonl"
    file.write_text(json.dumps({"messages": chat}))
    value = answered(cli("generate", "--input", file, "-m", model_dir, "--max-new-tokens", 3, "--json"))
    model, tokenizer = orthrus.load(model_dir)
    [expected] = orthrus.generate(model, tokenizer, chat, max_new_tokens=3)
    assert value["completions"][0]["prompt"] == chat
    assert value["completions"][0]["token_ids"] == expected.token_ids
    file.write_text(json.dumps({"id": "a", "messages": chat, "tools": [{"name": "f"}]}))
    ran = cli("generate", "--input", file, "-m", model_dir)
    assert (ran.code, ran.out) == (1, "")
    assert "error: a: tools were given, but this tokenizer's chat template presents none" in ran.err


def test_an_adapter_that_names_no_backbone_takes_one(cli: Cli, nameless: Path, model_dir: Path) -> None:
    """And without it the message names the option."""
    ran = cli("generate", "Hi", "-m", nameless)
    assert (ran.code, ran.out) == (1, "")
    assert "name it with backbone=…, or --backbone on the command line" in ran.err
    told = cli("generate", "Hi", "-m", nameless, "--backbone", model_dir, "--max-new-tokens", 4)
    assert (told.code, told.out) == (0, cli("generate", "Hi", "-m", model_dir, "--max-new-tokens", 4).out)


@pytest.mark.parametrize("verb", ["generate", "chat", "demo", "audit", "bench run", "bench passes", "convert", "serve"])
def test_every_verb_that_loads_an_adapter_takes_its_backbone(cli: Cli, verb: str) -> None:
    assert "--backbone" in cli(*verb.split(), "--help").out


def test_a_text_that_fails_is_named_and_the_others_are_printed(
    cli: Cli, model_dir: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1, as for any check that failed; the statistics are of all."""
    real = api.decode
    calls = iter([False, True, False, False])

    def decode(*arguments: Any) -> str:
        if next(calls):
            raise LookupError("no such token")
        return real(*arguments)

    monkeypatch.setattr(api, "decode", decode)
    ran = cli("generate", "--input", questions, "-m", model_dir, "--max-new-tokens", 3)
    assert ran.code == 1
    assert ran.out.count("── q/") == 4
    assert ran.err.endswith("error: q/4: no such token\n")


def test_json_is_one_object_with_the_names_of_the_design(cli: Cli, model_dir: Path) -> None:
    value = answered(cli("generate", "Hi", "-m", model_dir, "--max-new-tokens", 5, "--json", "--mode", "ar"))
    assert {"model", "mode", "plan", "dtype", "device", "completions", "stats"} <= value.keys()
    assert (value["mode"], value["plan"], value["dtype"], value["device"]) == ("ar", "ar", "float32", "cpu")
    [completion] = value["completions"]
    assert completion.keys() == {"prompt", "text", "token_ids", "finish_reason", "stats"}
    assert completion["stats"].keys() == value["stats"].keys() == STATISTICS
    assert value["stats"]["emitted"] == len(completion["token_ids"]) == 5
    assert completion["finish_reason"] == "length"


def test_means_of_cycles_are_over_completions_that_took_one(cli: Cli, model_dir: Path, questions: Path) -> None:
    """A text without a cycle has no tokens per cycle, and does not count as one with none."""
    stats = Stats(cycles=2, accepted=6, emitted=9, forwards=5), Stats(plain_steps=3, emitted=4, forwards=4)
    assert means(stats) == {"tokens_per_forward": 1.4, "acceptance_length": 3, "tokens_per_cycle": 4}
    given = ("generate", "--input", questions, "-m", model_dir, "--max-new-tokens", 4, "--json")
    mean = answered(cli(*given, "--mode", "ar"))["mean"]
    assert mean == {"tokens_per_forward": 1.0, "acceptance_length": None, "tokens_per_cycle": None}
    assert min(answered(cli(*given, "--plan", "full"))["mean"].values()) > 0


@pytest.mark.parametrize("batch_size", [1, 8])
def test_compare_finds_every_float32_text_identical(
    cli: Cli, model_dir: Path, questions: Path, batch_size: int
) -> None:
    ran = cli(
        *("generate", "--input", questions, "-m", model_dir, "--max-new-tokens", 12, "--compare", "--json"),
        *("--batch-size", batch_size),
    )
    value = answered(ran)
    assert value["identical"] is True
    assert value["identical_each"] == [True] * 4
    assert [a["token_ids"] for a in value["ar"]] == [c["token_ids"] for c in value["completions"]]
    assert [c["id"] for c in value["completions"]] == ["q/1", "q/4", "q/2", "q/chat"]
    rates = value["tokens_per_second"]
    assert value["speedup"] == pytest.approx(rates["orthrus"] / rates["ar"])
    assert all(answer["stats"]["cycles"] == 0 for answer in value["ar"])


@pytest.mark.parametrize(("dtype", "code"), [("float32", 1), ("bfloat16", 0)])
def test_compare_tells_when_texts_differ_and_fails_in_float32(
    cli: Cli, model_dir: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, code: int
) -> None:
    """Acceptance is broken on purpose: every draft is taken."""

    def gullible(draft_BM: Any, score_BM1V: Any) -> Verdict:
        verdict = accept_greedy(draft_BM, score_BM1V)
        verdict.tokens_BM1[:, :-1] = draft_BM
        return Verdict(verdict.tokens_BM1, verdict.accepted_B * 0 + draft_BM.shape[1])

    accept_greedy = accept.greedy
    monkeypatch.setattr(accept, "greedy", gullible)
    ran = cli(
        "generate",
        "Hi",
        "-m",
        model_dir,
        "--max-new-tokens",
        16,
        "--compare",
        "--json",
        "--dtype",
        dtype,
        "--plan",
        "full",
    )
    assert answered(ran, code)["identical"] is False
    assert answered(ran, code)["dtype"] == dtype


def test_standard_input_is_the_prompt_when_there_is_no_other(
    cli: Cli, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    [completion] = answered(cli("generate", "-m", model_dir, "--max-new-tokens", 3, "--json"))["completions"]
    assert completion["prompt"] == [{"role": "user", "content": "two\nlines"}]


def test_a_terminal_without_a_prompt_is_not_waited_for(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)
    ran = cli("generate")
    assert ran.code == 2
    assert "give a prompt" in ran.err


def test_all_turns_are_answered_with_the_models_own_answers_between(cli: Cli, model_dir: Path, questions: Path) -> None:
    ran = cli("generate", "--input", questions, "-m", model_dir, "--max-new-tokens", 6, "--json", "--turns", "all")
    *_, first, second = answered(ran)["completions"]
    assert [(c["id"], c["turn"]) for c in (first, second)] == [("q/chat", 0), ("q/chat", 1)]
    assert second["prompt"] == [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": first["text"]},
        {"role": "user", "content": "Two?"},
    ]
    only = cli("generate", "--input", questions, "-m", model_dir, "--max-new-tokens", 6, "--json")
    assert answered(only)["completions"][-1]["token_ids"] == first["token_ids"]


def test_a_limit_takes_the_first_prompts(cli: Cli, model_dir: Path, questions: Path) -> None:
    ran = cli("generate", "--input", questions, "-m", model_dir, "--max-new-tokens", 2, "--limit", 2)
    assert [line for line in ran.out.splitlines() if line.startswith("── ")] == ["── q/1", "── q/4"]


def test_sampling_follows_its_seed_and_temperature_0_is_greedy(cli: Cli, model_dir: Path) -> None:
    """Two seeds give one text with odds far below 1e-9: 24 tokens over a flat distribution of 300."""

    def tokens(*more: object) -> list[int]:
        ran = cli("generate", "Hi", "-m", model_dir, "--max-new-tokens", 24, "--plan", "full", "--json", *more)
        ids: list[int] = answered(ran)["completions"][0]["token_ids"]
        return ids

    once, again, other = (tokens("--temperature", 3, "--seed", seed) for seed in (1, 1, 2))
    assert once == again
    assert once != other
    assert tokens("--temperature", 0) == tokens()
    assert tokens("--top-k", 1) == tokens(), "the one most probable token is the greedy one"


def test_a_stop_string_ends_the_text(cli: Cli, model_dir: Path) -> None:
    whole = answered(cli("generate", "Hi", "-m", model_dir, "--max-new-tokens", 24, "--json"))["completions"][0]
    stop = next(c for c in whole["text"] if c.isascii() and c.isprintable())
    ran = cli("generate", "Hi", "-m", model_dir, "--max-new-tokens", 24, "--json", "--stop", stop, "--stop", "zzz")
    [cut] = answered(ran)["completions"]
    assert cut["finish_reason"] == "stop"
    assert cut["text"] == whole["text"][: len(cut["text"])]
    assert cut["text"].endswith(stop)


def test_an_end_of_text_token_in_the_prompt_changes_nothing_of_the_promise(cli: Cli, model_dir: Path) -> None:
    ran = cli(*("generate", "Say <|im_end|> now", "-m", model_dir, "--max-new-tokens", 8, "--compare", "--json"))
    assert answered(ran)["identical"] is True


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["Hi", "--max-new-tokens", "0"], 2, "max_new_tokens: Input should be greater than 0, found 0"),
        (["Hi", "--temperature", "nan"], 2, "temperature: Input should be a finite number, found nan"),
        (["Hi", "--temperature", "-1"], 2, "temperature: Input should be greater than 0"),
        (["Hi", "--top-p", "0"], 2, "top_p: Input should be greater than 0"),
        (["Hi", "--temperature", "0", "--top-k", "5"], 2, "--top-k has no effect"),
        (["Hi", "--plan", "fixed:1"], 2, "a plan is"),
        (["Hi", "--plan", "fixed:64"], 2, "was trained for at most 8"),
        (["Hi", "--mode", "ar", "--plan", "full"], 2, "mode='ar' decodes plainly"),
        (["Hi", "--stop", ""], 2, "stop_strings: String should have at least 1 character"),
        (["Hi", "--device", "nowhere"], 2, "device 'nowhere' cannot be used here"),
        ([""], 1, "the chat must say something"),
        (["", "--raw"], 1, "the prompt must not be empty"),
        (["\udcff"], 1, "must be text in UTF-8"),
        (["why " * CONTEXT], 1, f"the model reads at most {CONTEXT} tokens"),
        (["--input", "no-such-file.jsonl"], 1, "found no such file"),
    ],
)
def test_bad_input_says_why(cli: Cli, model_dir: Path, arguments: list[str], code: int, message: str) -> None:
    """Exit code 2 for an option's value, 1 for a prompt."""
    ran = cli("generate", "-m", model_dir, "--json", *arguments)
    assert (ran.code, ran.out) == (code, "")
    assert ran.err.startswith("error: ")
    assert message in ran.err


def test_a_prompt_of_a_file_that_is_too_long_is_named(cli: Cli, model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("short\n" + "long " * CONTEXT + "\n")
    ran = cli("generate", "-m", model_dir, "--input", tmp_path / "p.txt")
    assert (ran.code, ran.out) == (1, "")
    assert "error: p/2: the model reads at most" in ran.err


def unknown(home: Path) -> None:
    shutil.rmtree(home)


def truncated(home: Path) -> None:
    file = home / "orthrus.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def headless(home: Path) -> None:
    (home / "orthrus_config.json").write_text("{")


def foreign(home: Path) -> None:
    tiny("qwen3", seed=5, vocab_size=300, max_position_embeddings=CONTEXT).save_pretrained(home)


def misshapen(home: Path) -> None:
    tensors = load_file(home / "orthrus.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    save_file(tensors | {name: tensors[name][:, :-1].contiguous()}, home / "orthrus.safetensors")


def plain(home: Path) -> None:
    (home / "orthrus_config.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (unknown, "no model"),
        (truncated, "is damaged"),
        (headless, "must be JSON"),
        (foreign, "trained for a backbone with fingerprint"),
        (misshapen, "does not fit this backbone"),
        (plain, "is neither an adapter"),
    ],
)
def test_a_model_that_cannot_be_used_exits_1_and_says_why(
    cli: Cli, model_dir: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    home = Path(shutil.copytree(model_dir, tmp_path / "spoilt"))
    spoil(home)
    ran = cli("generate", "Hi", "-m", home, "--json")
    assert (ran.code, ran.out) == (1, "")
    assert message in ran.err
    assert "Traceback" not in ran.err


def test_an_interrupt_in_the_middle_leaves_standard_output_empty(
    cli: Cli, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> Verdict:
        raise KeyboardInterrupt

    monkeypatch.setattr(accept, "greedy", interrupted)
    assert cli("generate", "Hi", "-m", model_dir, "--json") == Ran(130, "", "\ninterrupted\n")


def test_a_tokenizer_without_a_template_continues_texts_and_refuses_chats(
    cli: Cli, model_dir: Path, tmp_path: Path, questions: Path
) -> None:
    home = Path(shutil.copytree(model_dir, tmp_path / "bare"))
    (home / "chat_template.jinja").unlink()
    [completion] = answered(cli("generate", "Hi", "-m", home, "--max-new-tokens", 2, "--json"))["completions"]
    assert completion["prompt"] == "Hi"
    ran = cli("generate", "--input", questions, "-m", home, "--turns", "all")
    assert (ran.code, ran.out) == (1, "")
    assert "a chat needs a tokenizer with a chat template" in ran.err
