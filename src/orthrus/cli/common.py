"""What every verb shares: options, loading, clocks, and how results are printed.

Torch and transformers are imported inside functions, so that `orthrus --help` stays fast.
"""

import json
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeVar

import typer
from rich.console import Console
from rich.segment import Segment, Segments

from orthrus.errors import ConfigError, OrthrusError
from orthrus.signals import handled

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from orthrus.bench.session import Loader
    from orthrus.decode.output import Stats

T = TypeVar("T")

_CONTROLS: Final = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""What a model writes must not move the cursor, ring the bell or set the title."""

DEFAULT: Final = "default"
"""What stands for the bundled model that can be had here (`settled`)."""


def settled(model: str) -> str:
    """Return a model's name: the one given, else smollm2, or nano where that cannot be had, which is said in a line."""
    if model != DEFAULT:
        return model
    from orthrus.zoo import WEIGHTS, default_model

    name, missing = default_model()
    if name in WEIGHTS and missing is None:
        from orthrus.checkpoints.load import home_of

        try:
            home_of(name)  # on the first call, converts
        except OrthrusError as error:
            name, missing = "nano", str(error)
    if missing is not None:
        say(f"{missing}: {name} answers, a toy that knows its own kinds of questions alone", to=err, style="dim")
    return name


WHICH = {"callback": settled, "show_default": "smollm2, or nano where that is not installed"}
Model = Annotated[str, typer.Option("--model", "-m", help="A bundled model, a directory, or a Hub id.", **WHICH)]
ModelArgument = Annotated[str, typer.Argument(help="A bundled model, a directory, or a Hub id.", **WHICH)]
Backbone = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL", help="The backbone of an adapter (bundled, a directory, a Hub id), where it names none."
    ),
]
Mode = Annotated[
    Literal["orthrus", "ar"], typer.Option(help="orthrus drafts and verifies, ar decodes plainly: same text.")
]
Plan = Annotated[
    str | None, typer.Option(metavar="PLAN", help="How cycles draft: auto, full, fixed:K, tree:N, onepass, lookup, ar.")
]
ExactName = Literal["distribution", "token"]
Exact = Annotated[ExactName, typer.Option(help="Promise the distribution, or plain decoding's very tokens.")]
_DTYPE: Final = typer.Option(help="Precision; float32 on a CPU and the checkpoint's own elsewhere, unless given.")
Dtype = Annotated[Literal["float32", "bfloat16", "float16", "int8", "int4"] | None, _DTYPE]
FloatDtype = Annotated[Literal["float32", "bfloat16", "float16"] | None, _DTYPE]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps …; CUDA if there is one, unless given.")]
Compile = Annotated[bool, typer.Option("--compile", help="Compile decoding passes; the first of each kind waits.")]
Offload = Annotated[
    Path | None,
    typer.Option(
        "--offload", metavar="DIR", help="Read the backbone's layers from disk in every pass; DIR for copies."
    ),
]
Drafter = Annotated[
    str | None,
    typer.Option(
        "--drafter",
        metavar="KIND:SOURCE",
        help="Who drafts in place of the view, such as dflash:DIR; the model may have no view then.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
MaxNewTokens = Annotated[int, typer.Option(help="Tokens to write at most.")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End at this text; may be repeated.")]

_SAMPLING = "Sampling (greedy unless one of the first four is given)"
Temperature = Annotated[float | None, typer.Option(rich_help_panel=_SAMPLING, help="0 is greedy.")]
TopK = Annotated[int | None, typer.Option(rich_help_panel=_SAMPLING, help="Keep the K most probable tokens.")]
TopP = Annotated[float | None, typer.Option(rich_help_panel=_SAMPLING, help="Keep tokens up to this mass.")]
MinP = Annotated[
    float | None, typer.Option(rich_help_panel=_SAMPLING, help="Keep tokens above this share of the best.")
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(rich_help_panel=_SAMPLING, help="Above 1 makes repeating less likely.")
]
Seed = Annotated[
    int, typer.Option(rich_help_panel=_SAMPLING, help="Fixes every draw (and the text, given a fixed --plan).")
]


def generation_options(*, mode: str, plan: str | None, **given: Any) -> dict[str, Any]:
    """Turn the command line's options into those of `orthrus.generate`, checked before any model is loaded.

    Raises ConfigError for values out of range, options that contradict each other, and an unknown plan.
    """
    from orthrus.decode.api import plan_of
    from orthrus.decode.options import Options

    names = ("temperature", "top_k", "top_p", "min_p")
    sampling = {name: value for name in names if (value := given.pop(name)) is not None}
    if sampling.get("temperature") == 0:
        del sampling["temperature"]
        if sampling:
            name = "--" + next(iter(sampling)).replace("_", "-")
            raise ConfigError(f"--temperature 0 is greedy, where {name} has no effect: leave one of the two out")
    options = {**given, **sampling, "do_sample": bool(sampling)}
    Options.of(None, **options)
    plan_of(mode, plan)
    return options


def loader(name: str, *, offload: Path | None = None, **options: Any) -> "Loader":
    """Return what loads a model and its tokenizer in a precision; options and errors are those of `orthrus.load`."""
    from transformers.utils import logging

    from orthrus.checkpoints.load import load

    logging.disable_progress_bar()
    return lambda dtype: load(name, dtype=dtype, offload_folder=offload, **options)


def load(name: str, *, dtype: str | None = None, **options: Any) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load a model and its tokenizer as `loader` does, with a sign of life on the terminal."""
    with err().status(f"loading {name} …"):
        return loader(name, **options)(dtype)


def look_at_kernels(model: "PreTrainedModel", exact: ExactName, *, rows: int) -> None:
    """Find out what `--exact token` rests on here, with a sign of life on the terminal: it takes some seconds once."""
    from orthrus.decode.exact import finding_for
    from orthrus.model.attach import config_of

    if exact == "token":
        with err().status("looking at this machine's kernels …"):
            finding_for(model, width=config_of(model).proposals + 1, rows=rows)


def record(model: "PreTrainedModel", exact: ExactName, *, rows: int, plan: str | None, plain: bool = True) -> None:
    """Record passes on CPUs before anybody waits for them, with a sign of life on the terminal: it takes seconds."""
    from orthrus.decode.api import plan_of
    from orthrus.decode.prepared import learn_prices, record_passes

    chosen = plan_of("orthrus", plan)
    if exact == "distribution":  # whose passes may have any shape
        with err().status("recording passes …"):
            record_passes(model, rows=rows, drafts=chosen.name != "ar", plain=plain)
            learn_prices(model, rows=rows, plan=chosen)


def precision(model: "PreTrainedModel") -> str:
    """Return a model's dtype as the command line spells it."""
    from orthrus.model.fingerprint import precision_of

    return precision_of(model)


def out() -> Console:
    return Console(highlight=False)


def err() -> Console:
    """Return the console for progress, remarks and errors."""
    return Console(stderr=True, highlight=False)


def say(text: str, *, style: str = "", end: str = "\n", to: Callable[[], Console] = out) -> None:
    """Print text as it is, tabs and all; only a terminal is spared control characters."""
    console = to()
    shown = text.translate(_CONTROLS) if console.is_terminal else text
    segment = Segment(shown + end, console.get_style(style) if style else None)
    console.print(Segments([segment]), end="", soft_wrap=True)


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


STOPPED: Final = 3
"""Exit code of long work that was stopped before its end and goes on when it is called again."""


@contextmanager
def resumable() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, and say of both that the same command goes on."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    try:
        with handled(interrupt, signal.SIGTERM):
            yield
    except KeyboardInterrupt:
        say("stopped; the same command goes on from there", to=err)
        raise typer.Exit(STOPPED) from None


@dataclass(slots=True)
class Watch:
    """Count the seconds spent in `with` blocks, or waiting for an iterator and not on what it yields."""

    seconds: float = 0.0
    _started: float = 0.0

    def __enter__(self) -> "Watch":
        self._started = perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += perf_counter() - self._started

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items with the clock running only while the next one is made."""
        iterator = iter(items)
        while True:
            try:
                with self:
                    item = next(iterator)
            except StopIteration:
                return
            yield item


def rate(tokens: int, seconds: float) -> float:
    """Return tokens per second; 0 for no time at all."""
    return tokens / seconds if seconds else 0.0


def statistics_line(stats: "Stats", seconds: float | None = None) -> str:
    """Put a completion's statistics, or those of several, into one line."""
    parts = [f"{stats.emitted} tokens"]
    if seconds is not None:
        parts += [f"{seconds:.2f} s", f"{rate(stats.emitted, seconds):.0f} tokens/s"]
    parts.append(f"{stats.tokens_per_forward:.2f} tokens per forward")
    if stats.cycles:
        parts.append(f"{stats.tokens_per_cycle:.2f} per cycle")
    return " · ".join(parts)
