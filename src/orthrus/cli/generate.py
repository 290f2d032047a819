"""`orthrus generate`: complete prompts, and compare with plain decoding; `cli.runs` answers them."""

import dataclasses
import sys
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from orthrus.cli import common, measuring, runs
from orthrus.cli.common import err, print_json, say, statistics_line
from orthrus.cli.comparing import Comparison
from orthrus.cli.runs import Job, Run
from orthrus.data.prompts import PromptRecord, read_prompts, user_prompt
from orthrus.errors import PromptError

if TYPE_CHECKING:
    from orthrus.decode.output import Stats

Prompt = Annotated[str | None, typer.Argument(help="The prompt; standard input when absent.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Completions in flight at once.")]
Input = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="A prompt set: JSONL records, text with a prompt a line, or a dataset's name."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Read only the first prompts of --input.")]
Raw = Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")]
Turns = Annotated[
    Literal["first", "all"],
    typer.Option(help="Where a prompt has several turns: answer the first, or all, one after another."),
]
Compare = Annotated[
    bool,
    typer.Option("--compare", help="Decode plainly too; exit code 1 if texts differ that are promised not to."),
]


def generate(
    prompt: Prompt = None,
    model: common.Model = common.DEFAULT,
    backbone: common.Backbone = None,
    mode: common.Mode = "orthrus",
    plan: common.Plan = None,
    exact: common.Exact = "distribution",
    max_new_tokens: common.MaxNewTokens = 256,
    stop: common.Stop = None,
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
    batch_size: BatchSize = 1,
    input: Input = None,
    limit: Limit = None,
    raw: Raw = False,
    turns: Turns = "first",
    compare: Compare = False,
    json: common.Json = False,
) -> None:
    """Complete a prompt, or every prompt of a file."""
    if compare and mode == "ar":
        raise typer.BadParameter("--compare runs both modes: leave --mode out")
    if raw and turns == "all":
        raise typer.BadParameter("--raw continues one text: it does not go with --turns all")
    options = common.generation_options(
        mode=mode,
        plan=plan,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop_strings=stop,
        max_new_tokens=max_new_tokens,
    )
    records = _records(prompt, input, limit)
    if turns == "first":
        records = [dataclasses.replace(record, turns=record.turns[:1]) for record in records]
    if compare:
        measuring.prepare(device=device)
    loaded, tokenizer = common.load(
        model, backbone=backbone, dtype=dtype, device=device, compile=compile, offload=offload, drafter=drafter
    )
    single = all(len(record.turns) == 1 and len(record.turns[0]) == 1 for record in records)  # a text of the user's
    job = Job(
        model=loaded,
        tokenizer=tokenizer,
        records=records,
        raw=raw or (tokenizer.chat_template is None and single),
        plan=plan,
        exact=exact,
        batch_size=batch_size,
        options=options,
    )
    report(job, "compare" if compare else mode, name=model, json=json)


def report(job: Job, mode: Literal["orthrus", "ar", "compare"], *, name: str, json: bool) -> None:
    """Run a job and print what came of it; exit code 1 where a text fails or a comparison breaks the promise."""
    runs.check(job)
    rows = min(job.batch_size, len(job.records))
    common.look_at_kernels(job.model, job.exact, rows=rows)
    if mode == "compare":
        common.record(job.model, job.exact, rows=rows, plan=job.plan)
        runs.warm_up(job, ("ar", "orthrus"))
        plain = runs.run(job, "ar")
        made = runs.run(job, "orthrus")
        compared = _comparison(made, plain)
    else:
        made, compared = runs.run(job, mode), {}
    if json:
        print_json(_described(job, "orthrus" if mode == "compare" else mode, name, made) | compared)
    else:
        _show(made, compared)
    failed = [answer for answer in made.answers if answer.completion.error is not None]
    for answer in failed:
        say(f"error: {answer.record.id or 'the text'}: {answer.completion.error}", to=err)
    if failed:
        raise typer.Exit(1)
    promised = job.exact == "token" or (common.precision(job.model) == "float32" and not job.options["do_sample"])
    if promised and not compared.get("identical", True):
        raise typer.Exit(1)


def _records(prompt: str | None, input: str | None, limit: int | None) -> list[PromptRecord]:
    """Read the prompts from the one place that was named: argument, file or standard input."""
    if input is not None and prompt is not None:
        raise typer.BadParameter("give a prompt or --input, not both")
    if input is not None:
        return read_prompts(input, limit)
    if limit is not None:
        raise typer.BadParameter("--limit counts the prompts of --input, which is not given")
    if prompt is None:
        if sys.stdin.isatty():
            raise typer.BadParameter("give a prompt, --input FILE, or text on standard input")
        prompt = _standard_input()
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise PromptError("the prompt must be text in UTF-8, found other bytes") from error
    return [user_prompt(prompt)]


def _standard_input() -> str:
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise PromptError(f"standard input must be text in UTF-8, found: {error}") from error


def _described(job: Job, mode: runs.Mode, name: str, made: Run) -> dict[str, Any]:
    """Return a run as plain JSON values: pooled statistics, and their mean over completions beside them."""
    from orthrus.decode.api import plan_of

    return {
        "model": name,
        "mode": mode,
        "plan": plan_of(mode, None if mode == "ar" else job.plan).name,
        "exact": job.exact,
        "dtype": common.precision(job.model),
        "device": str(job.model.device),
        "batch_size": job.batch_size,
        "options": {key: value for key, value in job.options.items() if value is not None},
        "completions": [answer.to_dict() for answer in made.answers],
        "stats": made.written.stats.to_dict(),
        "mean": means([answer.completion.stats for answer in made.answers]),
        "seconds": {mode: made.seconds},
        "tokens_per_second": {mode: made.written.tokens_per_second},
    }


def means(parts: Sequence["Stats"]) -> dict[str, float | None]:
    """Return means over completions; those of cycles are over completions that took one, None where none did."""
    cycled = [part for part in parts if part.cycles]
    return {
        "tokens_per_forward": fmean(part.tokens_per_forward for part in parts),
        "acceptance_length": fmean(part.acceptance_length for part in cycled) if cycled else None,
        "tokens_per_cycle": fmean(part.tokens_per_cycle for part in cycled) if cycled else None,
    }


def _comparison(made: Run, plain: Run) -> dict[str, Any]:
    """Return what `--compare` adds: the plain completions, whether they are the same, and the speedup."""
    both = Comparison(plain=plain.written, made=made.written)
    return {
        "ar": [answer.to_dict() for answer in plain.answers],
        "identical": both.identical,
        "identical_each": both.each,
        "speedup": both.speedup,
        "seconds": {"orthrus": made.seconds, "ar": plain.seconds},
        "tokens_per_second": {"orthrus": both.made.tokens_per_second, "ar": both.plain.tokens_per_second},
    }


def _show(made: Run, compared: dict[str, Any]) -> None:
    """Print texts on standard output and statistics on standard error."""
    several = len(made.answers) > 1
    for answer in made.answers:
        if several:
            turn = f", turn {answer.turn + 1}" if len(answer.record.turns) > 1 else ""
            say(f"── {answer.record.id}{turn}", style="cyan")
        say(answer.completion.text)
        if several:
            line = statistics_line(answer.completion.stats)
            say(f"{line} · {answer.completion.finish_reason}\n", style="dim", to=err)
    end = f" · {len(made.answers)} completions" if several else f" · {made.answers[0].completion.finish_reason}"
    say(statistics_line(made.written.stats, made.seconds) + end, style="dim", to=err)
    if compared:
        same = sum(compared["identical_each"])
        say(
            f"identical to plain decoding: {same} of {len(made.answers)} · "
            f"{compared['speedup']:.2f} times as fast "
            f"({compared['tokens_per_second']['ar']:.0f} tokens/s)",
            style="dim",
            to=err,
        )
