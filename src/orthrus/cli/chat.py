"""`orthrus chat`: a conversation in the terminal that streams and keeps its cache.

One row of one engine holds the conversation, so each turn reads only what is new.
"""

import difflib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orthrus.cli import common
from orthrus.cli.common import Watch, err, say, statistics_line
from orthrus.data.prompts import Message
from orthrus.errors import OrthrusError, PromptError
from orthrus.signals import handled

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from orthrus.decode.output import Chunk, Stats

HELP = """\
/stats        statistics of the last answer and of the conversation
/reset        forget the conversation, keep the system message
/system TEXT  set the system message (without TEXT: none)
/help         this list
/quit         end (or Ctrl-D); Ctrl-C ends an answer"""

COMMANDS = ("/stats", "/reset", "/system", "/help", "/quit", "/exit")

Window = Annotated[int, typer.Option(min=64, help="Tokens of conversation to keep at most.")]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="System message to begin with.")]


def chat(
    model: common.Model = common.DEFAULT,
    backbone: common.Backbone = None,
    system: System = None,
    mode: common.Mode = "orthrus",
    plan: common.Plan = None,
    max_new_tokens: common.MaxNewTokens = 1024,
    window: Window = 8192,
    exact: common.Exact = "distribution",
    temperature: common.Temperature = None,
    top_k: common.TopK = None,
    top_p: common.TopP = None,
    min_p: common.MinP = None,
    repetition_penalty: common.RepetitionPenalty = None,
    seed: common.Seed = 0,
    dtype: common.Dtype = None,
    device: common.Device = None,
    compile: common.Compile = False,
    offload: common.Offload = None,
    drafter: common.Drafter = None,
) -> None:
    """Talk with a model; /help lists what else can be said."""
    options = common.generation_options(
        mode=mode,
        plan=plan,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_new_tokens=max_new_tokens,
    )
    loaded, tokenizer = common.load(
        model, backbone=backbone, dtype=dtype, device=device, compile=compile, offload=offload, drafter=drafter
    )
    common.look_at_kernels(loaded, exact, rows=1)
    talk = Conversation(loaded, tokenizer, mode=mode, plan=plan, exact=exact, window=window, options=options)
    talk.system = system
    say(
        f"{model} · {common.precision(loaded)} · {loaded.device} · {talk.window} tokens · /help",
        style="dim",
        to=err,
    )
    while (line := _read()) is not None:
        if line.startswith("/"):
            if not _obey(line, talk):
                break
        elif line:
            _answer(line, talk)


class Conversation:
    """A chat over one row of one engine.

    Attributes:
        messages: what has been said, the system message aside.
        system: the system message, or None.
        window: tokens the conversation may grow to: what was asked for, or the model's context.
        last: statistics and seconds of the last answer.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        mode: str,
        plan: str | None,
        exact: common.ExactName,
        window: int,
        options: dict[str, Any],
    ) -> None:
        """Prepare the engine; raises PromptError for a tokenizer without a chat template."""
        from orthrus.decode.api import engine_for, plan_of
        from orthrus.decode.options import Options

        if tokenizer.chat_template is None:
            raise PromptError(
                "a chat needs a tokenizer with a chat template, this one has none: orthrus generate --raw"
            )
        self.window: int = min(window, model.config.get_text_config().max_position_embeddings)
        # Room for the longest conversation: all of the window but the one token that is left to write.
        longest, last = range(self.window - 1), Options(max_new_tokens=1)
        self.engine = engine_for(model, [longest], last, plan_of(mode, plan), rows=1, exact=exact)
        self.system: str | None = None
        self.messages: list[Message] = []
        self.stats: list[Stats] = []
        self.last: tuple[Stats, float] | None = None
        self._model, self._tokenizer, self._options = model, tokenizer, options

    def ask(self, text: str, *, stopped: Callable[[], bool]) -> "Iterator[Chunk]":
        """Stream the answer to a text and remember both; `stopped` is asked after every cycle.

        Raises PromptError, with the conversation as it was, when there is no room left for an answer.
        """
        from orthrus.decode.api import stream
        from orthrus.decode.text import encode

        said = [*self.messages, {"role": "user", "content": text}]
        prompt = [{"role": "system", "content": self.system}, *said] if self.system else said
        length = len(encode(self._tokenizer, prompt))
        room = min(self._options["max_new_tokens"], self.window - length)
        if room < 1:
            raise PromptError(
                f"the conversation has {length} tokens, there is room for {self.window}: /reset begins anew"
            )
        chunks = stream(
            self._model,
            self._tokenizer,
            prompt,
            engine=self.engine,
            **self._options | {"max_new_tokens": room},
        )
        watch, answer = Watch(), ""
        with closing(chunks):
            for chunk in watch.over(chunks):
                answer += chunk.text
                self.last = chunk.stats, watch.seconds
                yield chunk
                if stopped():
                    break
        if self.last is not None:
            self.stats.append(self.last[0])
        self.messages = [*said, {"role": "assistant", "content": answer}]

    def reset(self) -> None:
        self.messages, self.stats, self.last = [], [], None


def _read() -> str | None:
    """Read one line; None at the end of the input. Ctrl-C empties the line."""
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  (line editing and history for input())
    while True:
        try:
            return input("\n> " if interactive else "").strip()
        except EOFError:
            if interactive:
                say("")
            return None
        except KeyboardInterrupt:
            say("\n/quit or Ctrl-D ends", style="dim", to=err)


def _obey(line: str, talk: Conversation) -> bool:
    """Carry out a command; returns False when it ends the chat."""
    word, _, text = line.partition(" ")
    match word:
        case "/quit" | "/exit":
            return False
        case "/help":
            say(HELP, to=err)
        case "/reset":
            talk.reset()
            say("the conversation is forgotten", style="dim", to=err)
        case "/system":
            talk.system = text.strip() or None
            say(f"system message: {talk.system or 'none'}", style="dim", to=err)
        case "/stats":
            _show_statistics(talk)
        case _:
            near = difflib.get_close_matches(word, COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else "/help lists them"
            say(f"no command {word}; {hint}", to=err)
    return True


def _show_statistics(talk: Conversation) -> None:
    """Print the statistics of the last answer and of all of them."""
    from orthrus.decode.output import Stats

    if talk.last is None:
        say("nothing has been said yet", style="dim", to=err)
        return
    stats, seconds = talk.last
    say(f"last answer: {statistics_line(stats, seconds)}", to=err)
    say(f"conversation: {statistics_line(Stats.total(talk.stats))}", to=err)


def _answer(text: str, talk: Conversation) -> None:
    """Stream one answer to the terminal; Ctrl-C ends it and keeps what was said."""
    reason = None
    with _interrupts() as pressed:
        try:
            for chunk in talk.ask(text, stopped=pressed.is_set):
                say(chunk.text, end="")
                sys.stdout.flush()
                reason = chunk.finish_reason
        except OrthrusError as error:
            say(str(error), style="bold red", to=err)
            return
    say("")
    if pressed.is_set():
        say("interrupted; the conversation goes on", style="dim", to=err)
    elif reason == "length":
        say("cut: --max-new-tokens or the window is used up", style="dim", to=err)


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Turn Ctrl-C into a flag, so that it falls between two cycles; a second one interrupts at once."""
    pressed = threading.Event()

    def note() -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    with handled(note, signal.SIGINT):
        yield pressed
