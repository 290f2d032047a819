"""`orthrus demo`: decode built-in prompts plainly and with drafts, and compare the two.

An assistant is asked everyday questions; nano, which knows no others, held-out problems of its own kinds. No training
saw either.
"""

from collections.abc import Iterable
from itertools import cycle, islice
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from orthrus.cli import common
from orthrus.cli.common import Watch, out, print_json, say, statistics_line
from orthrus.cli.comparing import Comparison, Written
from orthrus.cli.measuring import Threads, prepare, show

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from orthrus.decode.output import Chunk

DRAFT, BONUS = "green", "bold magenta"
COLOURS = {"ar": ("", ""), "orthrus": (DRAFT, BONUS)}
_WARM_UP_TOKENS = 32
QUESTIONS: Final = (
    (
        "arithmetic",
        "A baker makes 24 rolls every morning. She sells 17 of them for 2 dollars each and gives the rest away. "
        "How much does she earn in a week, and how many rolls does she give away?",
    ),
    (
        "function",
        "Write a Python function `is_palindrome(text)` that ignores spaces and capital letters, with a docstring and "
        "two examples.",
    ),
    (
        "rewrite",
        "Rewrite this politely: Send me the report by Friday. The last one was full of mistakes, and I had to do half "
        "of the work again.",
    ),
    (
        "table",
        "Make a table of the planets Mercury, Venus, Earth and Mars with the columns name, place from the sun and "
        "number of moons.",
    ),
    ("chat", "I have a free Sunday and it is raining. What could I do with two children?"),
)
"""What an assistant is asked, by kinds that drafts do well or badly on."""

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
    prepare(threads, device)
    loaded, tokenizer = common.load(model, backbone=backbone, dtype=dtype, device=device)
    common.record(loaded, exact, rows=1, plan=plan)  # or the first texts of either would pay for it
    chosen = _asked(model, prompts)
    for mode in ("ar", "orthrus"):
        warm = min(_WARM_UP_TOKENS, max_new_tokens)
        generate(loaded, tokenizer, [_chat(chosen[0][1])], mode=mode, exact=exact, max_new_tokens=warm)
    pairs = [
        _both(loaded, tokenizer, *one, plan=plan, exact=exact, max_new_tokens=max_new_tokens, shown=not json)
        for one in chosen
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
            {"kind": kind, "prompt": prompt, "text": text} | _figures(pair)
            for (kind, prompt), (text, pair) in zip(chosen, pairs, strict=True)
        ]
        print_json({**described, "prompts": each, "all": _figures(whole)})
    else:
        named = [(kind, pair) for (kind, _), (_, pair) in zip(chosen, pairs, strict=True)]
        _table([*named, ("all", whole)], " · ".join(f"{name} {value}" for name, value in described.items()))
    if not whole.identical and (exact == "token" or described["dtype"] == "float32"):
        raise typer.Exit(1)


def _asked(model: str, count: int) -> list[tuple[str, str]]:
    """Return so many questions for a model, each with its kind."""
    from orthrus.data.synthetic import problems

    if model != "nano":
        return list(islice(cycle(QUESTIONS), count))
    return [(one.domain, one.prompt) for one in problems(count, split="heldout")]


def _chat(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def _both(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    kind: str,
    prompt: str,
    *,
    plan: str | None,
    exact: common.ExactName,
    max_new_tokens: int,
    shown: bool,
) -> tuple[str, Comparison]:
    """Decode one prompt both ways, plainly first; returns the text."""
    from orthrus.decode.api import stream

    if shown:
        out().rule(kind)
        say(prompt, style="cyan")
    written = []
    for title, mode in (("plain decoding", "ar"), ("Orthrus", "orthrus")):
        if shown:
            say(f"\n▸ {title}", style="bold")
        chunks = stream(
            model,
            tokenizer,
            _chat(prompt),
            mode="ar" if mode == "ar" else "orthrus",
            plan=plan if mode == "orthrus" else None,
            exact=exact,
            max_new_tokens=max_new_tokens,
        )
        text, one = _timed(chunks, styles=COLOURS[mode] if shown else None)
        written.append(one)
        if shown:
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
    return {
        "ar": pair.plain.to_dict(),
        "orthrus": pair.made.to_dict(),
        "speedup": pair.speedup,
        "tokens_per_forward": pair.made.stats.tokens_per_forward,
        "tokens_per_cycle": pair.made.stats.tokens_per_cycle,
        "identical": pair.identical,
    }


def _table(pairs: list[tuple[str, Comparison]], caption: str) -> None:
    """Print a line for each comparison, and what the colours mean."""
    from orthrus.bench.tables import Grid

    rows = [
        {
            "prompt": name,
            "identical": "yes" if pair.identical else "no",
            "tokens": str(pair.made.stats.emitted),
            "plain\ntokens/s": f"{pair.plain.tokens_per_second:.0f}",
            "Orthrus\ntokens/s": f"{pair.made.tokens_per_second:.0f}",
            "ratio": f"{pair.speedup:.2f}",
            "tokens per\nforward": f"{pair.made.stats.tokens_per_forward:.2f}",
            "tokens per\ncycle": f"{pair.made.stats.tokens_per_cycle:.2f}",
        }
        for name, pair in pairs
    ]
    show([Grid.of("", rows, labels=2)])
    say(caption, style="dim")
    out().print(f"[{DRAFT}]accepted drafts[/] · [{BONUS}]the backbone's own tokens[/] · prompts unseen in training")
