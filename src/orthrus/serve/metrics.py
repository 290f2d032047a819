"""What `/metrics` tells, in Prometheus' format. Where vLLM has a metric, it has the same name after the prefix.

Counters of drafts follow vLLM too: a "draft" is a cycle that proposed something.
"""

from functools import partial
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from orthrus.decode.output import Stats
from orthrus.serve.jobs import Event, Job
from orthrus.serve.loop import Loop

PREFIX: Final = "orthrus:"
_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
_TOKENS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)


class Metrics:
    """Count and time what a loop does, in a registry of its own."""

    def __init__(self, model: str, *, slots: int) -> None:
        """Name the model; `slots` is the number of drafts that a cycle has at most."""
        self.registry = CollectorRegistry()
        self._model = model
        count = partial(self._made, Counter)
        seconds, tokens = (partial(self._made, Histogram, buckets=buckets) for buckets in (_SECONDS, _TOKENS))
        self._prompt = count("prompt_tokens", "Tokens of prompts that joined a batch.")
        self._generated = count("generation_tokens", "Tokens written.")
        self._ended = count("request_success", "Completions that ended.", "finished_reason")
        self._drafts = count("spec_decode_num_drafts", "Cycles that proposed drafts.")
        self._drafted = count("spec_decode_num_draft_tokens", "Drafts proposed.")
        self._accepted = count("spec_decode_num_accepted_tokens", "Drafts accepted.")
        by_position = count(
            "spec_decode_num_accepted_tokens_per_pos", "Drafts accepted, by their position in the block.", "position"
        )
        self._at = [by_position.labels(model, str(slot)) for slot in range(slots)]
        self._asked = count("prefix_cache_queries", "Tokens of prompts whose keys were looked for.")
        self._found = count("prefix_cache_hits", "Tokens of prompts whose keys were there already.")
        self._first = seconds("time_to_first_token_seconds", "From arrival to the first tokens.")
        self._between = seconds("inter_token_latency_seconds", "From one cycle's tokens to the next one's.")
        self._per_token = seconds("request_time_per_output_token_seconds", "Mean after the first token.")
        self._whole = seconds("e2e_request_latency_seconds", "From arrival to the end.")
        self._queued = seconds("request_queue_time_seconds", "From arrival to the batch.")
        self._prompts = tokens("request_prompt_tokens", "Tokens of a prompt.")
        self._lengths = tokens("request_generation_tokens", "Tokens of a completion.")

    def follow(self, loop: Loop, *, positions: int) -> None:
        """Show how many completions run and wait, and how much of `positions` cache positions is in use."""
        gauges = {
            "num_requests_running": ("Completions in a batch.", lambda: loop.running),
            "num_requests_waiting": ("Completions that wait.", lambda: loop.waiting),
            "kv_cache_usage_perc": ("Share of the cache in use, 1 is all.", lambda: loop.positions / positions),
        }
        for name, (text, read) in gauges.items():
            self._made(Gauge, name, text).set_function(read)

    def started(self, job: Job, now: float) -> None:
        self._queued.observe(now - job.submitted)
        self._prompt.inc(len(job.prompt_ids))
        self._prompts.observe(len(job.prompt_ids))

    def advanced(self, job: Job, event: Event, now: float) -> None:
        if job.latest is None:
            self._asked.inc(len(job.prompt_ids))
            self._found.inc(event.cached)
            self._first.observe(now - job.submitted)
        else:
            self._between.observe(now - job.latest)
        self._generated.inc(len(event.token_ids))
        if event.drafted:
            self._drafts.inc()
            self._drafted.inc(event.drafted)
            self._accepted.inc(event.accepted)
            for counter in self._at[: event.accepted]:
                counter.inc()

    def ended(self, job: Job, reason: str, stats: Stats | None, now: float) -> None:
        self._ended.labels(self._model, reason).inc()
        self._whole.observe(now - job.submitted)
        if stats is not None:
            self._lengths.observe(stats.emitted)
            if job.first is not None and stats.emitted > 1:
                self._per_token.observe((now - job.first) / (stats.emitted - 1))

    def page(self) -> bytes:
        return generate_latest(self.registry)

    def _made(self, kind: Any, name: str, text: str, *labels: str, **how: Any) -> Any:
        """Return a metric of the model; one with further labels is to be given those first."""
        made = kind(f"{PREFIX}{name}", text, ["model_name", *labels], registry=self.registry, **how)
        return made if labels else made.labels(self._model)
