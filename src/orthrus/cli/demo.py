"""`orthrus demo`: decode built-in prompts plainly and with drafts, and compare the two.

An assistant is asked everyday questions; nano, which knows no others, held-out problems of its own kinds. No training
saw either.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from orthrus.cli import common
from orthrus.cli.common import Watch, out, print_json, say, statistics_line
from orthrus.cli.comparing import Comparison, Written
from orthrus.cli.measuring import Threads, set_threads
from orthrus.cli.questions import Question, questions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from orthrus.decode.output import Chunk

DRAFT, BONUS = "green", "bold magenta"
COLOURS = {"ar": ("", ""), "orthrus": (DRAFT, BONUS)}
_WARM_UP_TOKENS = 32

Prompts = Annotated[int, typer.Option(min=1, help="How many questions, of different kinds in turn.")]


def demo(
    model: common.Model = common.DEFAULT,
    backbone: common.Backbone = None,
    prompts: Prompts = 5,
    max_new_tokens: common.MaxNewTokens = 256,
    plan: common.Plan = None,
    exact: common.Exact = "distribution",
    dtype: common.Dtype = None,
    device: common.Device = None,
    threads: Threads = None,
    json: common.Json = False,
) -> None:
    """Watch plain decoding and Orthrus write the same texts, and compare their speed."""
    import torch

    from orthrus.decode.api import generate, plan_of
    from orthrus.decode.options import Options

    Options.of(None, max_new_tokens=max_new_tokens)
    settled = plan_of("orthrus", plan).name
    set_threads(threads)
    loaded, tokenizer = common.load(model, backbone=backbone, dtype=dtype, device=device)
    common.record(loaded, exact, rows=1, plan=plan)  # or the first texts of either would pay for it
    chosen = _asked(model, prompts)
    for mode in ("ar", "orthrus"):
        warm = min(_WARM_UP_TOKENS, max_new_tokens)
        generate(loaded, tokenizer, [chosen[0].messages], mode=mode, exact=exact, max_new_tokens=warm)
    pairs = [
        _both(loaded, tokenizer, question, plan=plan, exact=exact, max_new_tokens=max_new_tokens, show=not json)
        for question in chosen
    ]
    whole = Comparison.total([pair for _, pair in pairs])
    described = {
        "model": model,
        "dtype": common.precision(loaded),
        "device": str(loaded.device),
        "threads": torch.get_num_threads(),
        "plan": settled,
        "exact": exact,
    }
    if json:
        each = [
            {"kind": question.kind, "prompt": question.prompt, "text": text} | _figures(pair)
            for question, (text, pair) in zip(chosen, pairs, strict=True)
        ]
        print_json({**described, "prompts": each, "all": _figures(whole)})
    else:
        named = [(question.kind, pair) for question, (_, pair) in zip(chosen, pairs, strict=True)]
        _table([*named, ("all", whole)], " · ".join(f"{name} {value}" for name, value in described.items()))
    if not whole.identical and (exact == "token" or described["dtype"] == "float32"):
        raise typer.Exit(1)


def _asked(model: str, count: int) -> list[Question]:
    """Return the questions for a model."""
    from orthrus.data.synthetic import problems

    if model != "nano":
        return questions(count)
    return [Question(kind=one.domain, prompt=one.prompt) for one in problems(count, split="heldout")]


def _both(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    question: Question,
    *,
    plan: str | None,
    exact: common.ExactName,
    max_new_tokens: int,
    show: bool,
) -> tuple[str, Comparison]:
    """Decode one prompt both ways, plainly first; returns the text."""
    from orthrus.decode.api import stream

    if show:
        out().rule(question.kind)
        say(question.prompt, style="cyan")
    written = []
    for title, mode in (("plain decoding", "ar"), ("Orthrus", "orthrus")):
        if show:
            say(f"\n▸ {title}", style="bold")
        chunks = stream(
            model,
            tokenizer,
            question.messages,
            mode="ar" if mode == "ar" else "orthrus",
            plan=plan if mode == "orthrus" else None,
            exact=exact,
            max_new_tokens=max_new_tokens,
        )
        text, one = _timed(chunks, styles=COLOURS[mode] if show else None)
        written.append(one)
        if show:
            say(statistics_line(one.stats, one.seconds) + "\n", style="dim")
    return text, Comparison(plain=written[0], made=written[1])


def _timed(chunks: "Iterable[Chunk]", *, styles: tuple[str, str] | None) -> tuple[str, Written]:
    """Follow a stream to its end and show it in these styles, if any; the clock stops while it is printed."""
    watch = Watch()
    ids: list[int] = []
    text = ""
    for chunk in watch.over(chunks):
        ids += chunk.token_ids
        text += chunk.text
        stats = chunk.stats
        if styles is not None:
            draft, backbone = styles
            for part, style in ((chunk.first_text, backbone), (chunk.draft_text, draft), (chunk.bonus_text, backbone)):
                say(part, style=style, end="")
    if styles is not None:
        say("")
    return text, Written(texts=[ids], stats=stats, seconds=watch.seconds)


def _figures(pair: Comparison) -> dict[str, Any]:
    """Return a comparison as plain JSON values."""
    return {
        "ar": pair.plain.to_dict(),
        "orthrus": pair.made.to_dict(),
        "speedup": pair.speedup,
        "tokens_per_forward": pair.made.stats.tokens_per_forward,
        "tokens_per_cycle": pair.made.stats.tokens_per_cycle,
        "identical": pair.identical,
    }


def _table(pairs: list[tuple[str, Comparison]], caption: str) -> None:
    """Print a line for each comparison, the last one apart, and what the colours mean."""
    table = Table()
    table.add_column("prompt")
    for heading in (
        "tokens",
        "plain\ntokens/s",
        "Orthrus\ntokens/s",
        "ratio",
        "tokens per\nforward",
        "tokens per\ncycle",
    ):
        table.add_column(heading, justify="right")
    table.add_column("identical")
    for name, pair in pairs:
        if pair is pairs[-1][1]:
            table.add_section()
        table.add_row(
            name,
            str(pair.made.stats.emitted),
            f"{pair.plain.tokens_per_second:.0f}",
            f"{pair.made.tokens_per_second:.0f}",
            f"{pair.speedup:.2f}",
            f"{pair.made.stats.tokens_per_forward:.2f}",
            f"{pair.made.stats.tokens_per_cycle:.2f}",
            "yes" if pair.identical else "no",
        )
    console = out()
    console.print(table)
    say(caption, style="dim")
    console.print(f"[{DRAFT}]accepted drafts[/] · [{BONUS}]the backbone's own tokens[/] · prompts unseen in training")
