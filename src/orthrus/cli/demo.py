"""`orthrus demo`: decode built-in prompts plainly and with drafts, and compare the two.

An assistant is asked everyday questions; nano, which knows no others, held-out problems of its own kinds. No training
saw either.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from orthrus.cli import common
from orthrus.cli.common import Watch, out, print_json, rate, say, statistics_line
from orthrus.cli.measuring import Threads, set_threads
from orthrus.cli.questions import Question, questions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from orthrus.decode.output import Chunk, Stats

DRAFT, BONUS = "green", "bold magenta"
COLOURS = {"ar": ("", ""), "orthrus": (DRAFT, BONUS)}
_WARM_UP_TOKENS = 32

Prompts = Annotated[int, typer.Option(min=1, help="How many questions, of different kinds in turn.")]


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """One text of one mode, or the sum of several; the seconds leave out what printing took."""

    token_ids: list[int]
    text: str
    stats: "Stats"
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second, prefill included."""
        return rate(self.stats.emitted, self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain JSON values."""
        return {
            "tokens_per_second": self.tokens_per_second,
            "seconds": self.seconds,
            "stats": self.stats.to_dict(),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One prompt's two texts, or the sum of all."""

    name: str
    ar: Timed
    orthrus: Timed
    identical: bool

    @property
    def speedup(self) -> float:
        """Orthrus's tokens per second over plain decoding's."""
        return self.orthrus.tokens_per_second / self.ar.tokens_per_second

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain JSON values."""
        return {
            "ar": self.ar.to_dict(),
            "orthrus": self.orthrus.to_dict(),
            "speedup": self.speedup,
            "tokens_per_forward": self.orthrus.stats.tokens_per_forward,
            "tokens_per_cycle": self.orthrus.stats.tokens_per_cycle,
            "identical": self.identical,
        }


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
    chosen = _asked(model, prompts)
    for mode in ("ar", "orthrus"):
        warm = min(_WARM_UP_TOKENS, max_new_tokens)
        generate(loaded, tokenizer, [chosen[0].messages], mode=mode, exact=exact, max_new_tokens=warm)
    pairs = [
        _pair(loaded, tokenizer, question, plan=plan, exact=exact, max_new_tokens=max_new_tokens, show=not json)
        for question in chosen
    ]
    whole = _sum(pairs)
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
            {"kind": question.kind, "prompt": question.prompt, "text": pair.orthrus.text} | pair.to_dict()
            for question, pair in zip(chosen, pairs, strict=True)
        ]
        print_json({**described, "prompts": each, "all": whole.to_dict()})
    else:
        _table(pairs, whole, " · ".join(f"{name} {value}" for name, value in described.items()))
    if not whole.identical and (exact == "token" or described["dtype"] == "float32"):
        raise typer.Exit(1)


def _asked(model: str, count: int) -> list[Question]:
    """Return the questions for a model."""
    from orthrus.data.synthetic import problems

    if model != "nano":
        return questions(count)
    return [Question(kind=one.domain, prompt=one.prompt) for one in problems(count, split="heldout")]


def _pair(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    question: Question,
    *,
    plan: str | None,
    exact: common.ExactName,
    max_new_tokens: int,
    show: bool,
) -> Pair:
    """Decode one prompt both ways, plainly first."""
    from orthrus.decode.api import stream

    if show:
        out().rule(question.kind)
        say(question.prompt, style="cyan")
    texts = []
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
        texts.append(_timed(chunks, styles=COLOURS[mode] if show else None))
        if show:
            say(statistics_line(texts[-1].stats, texts[-1].seconds) + "\n", style="dim")
    plain, made = texts
    return Pair(name=question.kind, ar=plain, orthrus=made, identical=plain.token_ids == made.token_ids)


def _timed(chunks: "Iterable[Chunk]", *, styles: tuple[str, str] | None) -> Timed:
    """Follow a stream to its end and show it in these styles, if any; the clock stops while it is printed."""
    watch = Watch()
    ids: list[int] = []
    text = ""
    for chunk in watch.over(chunks):
        ids += chunk.token_ids
        text += chunk.text
        stats = chunk.stats
        if styles is not None:
            for part, style in zip((chunk.draft_text, chunk.bonus_text), styles, strict=True):
                say(part, style=style, end="")
    if styles is not None:
        say("")
    return Timed(token_ids=ids, text=text, stats=stats, seconds=watch.seconds)


def _sum(pairs: list[Pair]) -> Pair:
    from orthrus.decode.output import Stats

    def total(parts: list[Timed]) -> Timed:
        stats = Stats.total(part.stats for part in parts)
        return Timed(token_ids=[], text="", stats=stats, seconds=sum(part.seconds for part in parts))

    return Pair(
        name="all",
        ar=total([pair.ar for pair in pairs]),
        orthrus=total([pair.orthrus for pair in pairs]),
        identical=all(pair.identical for pair in pairs),
    )


def _table(pairs: list[Pair], whole: Pair, caption: str) -> None:
    """Print one line per prompt and one for all of them, and what the colours mean."""
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
    for pair in (*pairs, whole):
        if pair is whole:
            table.add_section()
        table.add_row(
            pair.name,
            str(pair.orthrus.stats.emitted),
            f"{pair.ar.tokens_per_second:.0f}",
            f"{pair.orthrus.tokens_per_second:.0f}",
            f"{pair.speedup:.2f}",
            f"{pair.orthrus.stats.tokens_per_forward:.2f}",
            f"{pair.orthrus.stats.tokens_per_cycle:.2f}",
            "yes" if pair.identical else "no",
        )
    console = out()
    console.print(table)
    say(caption, style="dim")
    console.print(f"[{DRAFT}]accepted drafts[/] · [{BONUS}]bonus token of each cycle[/] · prompts unseen in training")
