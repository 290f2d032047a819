"""What a server serves: one model behind one loop, and how a request becomes jobs for it. Nothing of HTTP.

Prompts are encoded and checked here, so that a request that cannot be honoured never reaches the engine.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orthrus.decode.api import plan_of
from orthrus.decode.engine import Engine
from orthrus.decode.exact import Exact
from orthrus.decode.text import decode, encode
from orthrus.errors import ConfigError
from orthrus.model.attach import config_of
from orthrus.policy.steps import Plan
from orthrus.serve.errors import Refused
from orthrus.serve.loop import Event, Job, Loop
from orthrus.serve.metrics import Metrics
from orthrus.serve.openai import ChatRequest, CompletionRequest, Request

CONTEXT: Final = 8192
"""Positions per row, where neither the model nor the command line says less."""

COMPLETION_TOKENS: Final = 16
"""Tokens of a completion that does not say how many (OpenAI's default); a chat may fill its row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a server allows.

    Attributes:
        context: tokens of prompt and text together.
        queue: completions that may wait for a row.
        timeout: seconds a request may take; None for any.
    """

    context: int
    queue: int = 64
    timeout: float | None = 600.0


class Service:
    """A model, its tokenizer and the loop that decodes for all requests.

    Attributes:
        name: the model's name in requests and answers.
        loop: the thread that owns the engines.
        metrics: what it counts.
        limits: what it allows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        rows: int = 8,
        context: int | None = None,
        plan: str | None = None,
        exact: Exact = "distribution",
        queue: int = 64,
        timeout: float | None = 600.0,
    ) -> None:
        """Prepare the engines' settings; `start` starts the thread. Raises ConfigError for a setting out of range."""
        longest: int = model.config.get_text_config().max_position_embeddings
        if context is not None and not 2 <= context <= longest:
            raise ConfigError(f"context must be from 2 to the model's {longest} tokens, found {context}")
        self.name, self.tokenizer = name, tokenizer
        self.limits = Limits(context=context or min(longest, CONTEXT), queue=queue, timeout=timeout)
        block = config_of(model).block_size
        self.metrics = Metrics(name, slots=block - 1)
        drafted, plain = plan_of("orthrus", plan), plan_of("ar", None)

        def engine(plan: Plan) -> Callable[[], Engine]:
            capacity = Engine.room(0, self.limits.context, plan.scratch(block))
            return lambda: Engine(model, rows=rows, capacity=capacity, plan=plan, exact=exact)

        self.loop = Loop(
            {"orthrus": engine(drafted), "ar": engine(plain)},
            tokenizer=tokenizer,
            rows=rows,
            queue=queue,
            watcher=self.metrics,
        )
        self.metrics.follow(self.loop, positions=rows * self.limits.context)
        eos = model.generation_config.eos_token_id if model.generation_config is not None else None
        self._eos = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)
        self._vocabulary: int = model.get_input_embeddings().weight.shape[0]

    def start(self) -> None:
        """Start the loop's thread."""
        self.loop.start()

    def close(self) -> None:
        """End the loop's thread; open jobs end with an error."""
        self.loop.close()

    def check_model(self, name: str) -> None:
        """Refuse a request for another model."""
        if name != self.name:
            raise Refused(
                f"this server has the model {self.name!r}, the request is for {name!r}",
                status=404,
                param="model",
                code="model_not_found",
            )

    def encode(self, request: ChatRequest | CompletionRequest) -> list[list[int]]:
        """Return the request's prompts as tokens; raises Refused or PromptError for one that cannot be continued."""
        if isinstance(request, CompletionRequest):
            return [encode(self.tokenizer, prompt) for prompt in request.prompt]
        return [encode(self.tokenizer, request.chat(), chat_template_kwargs=request.chat_template_kwargs)]

    def echo(self, request: CompletionRequest) -> list[str] | None:
        """Return each choice's prompt as text, where the request wants it repeated."""
        if not request.echo:
            return None
        texts = [p if isinstance(p, str) else decode(self.tokenizer, p) for p in request.prompt]
        return [text for text in texts for _ in range(request.choices)]

    def jobs(self, request: Request, prompts: Sequence[list[int]], deliver: Callable[[int, Event], None]) -> list[Job]:
        """Make a job for each choice of each prompt; `deliver` is called with a choice's number and its events.

        Raises:
            Refused: a prompt outside the vocabulary or, with the tokens asked for, longer than the context.
        """
        deadline = None if self.limits.timeout is None else self.loop.clock() + self.limits.timeout
        made = []
        for place, prompt_ids in enumerate(prompts):
            limit = self._limit(request, prompt_ids)
            options = request.options(eos_token_id=self._eos, max_new_tokens=limit)
            for choice in range(request.choices):
                number = place * request.choices + choice
                job = Job(
                    prompt_ids=prompt_ids,
                    options=options,
                    deliver=_numbered(deliver, number),
                    index=number,
                    mode=request.orthrus.mode,
                    deadline=deadline,
                )
                made.append(job)
        return made

    def _limit(self, request: Request, prompt_ids: Sequence[int]) -> int:
        """Return how many tokens a completion may have."""
        field = "messages" if isinstance(request, ChatRequest) else "prompt"
        if not prompt_ids:
            raise Refused("the prompt must hold at least one token, found none", param=field)
        if max(prompt_ids) >= self._vocabulary:
            raise Refused(f"prompt tokens must be ids below {self._vocabulary}, found {max(prompt_ids)}", param=field)
        room = self.limits.context - len(prompt_ids)
        asked = request.limit
        if room < 1 or (asked or 1) > room:
            raise Refused(
                f"prompt and completion have {self.limits.context} tokens here, found {len(prompt_ids)} of the prompt "
                f"and {asked or 1} to write: shorten the one or ask for fewer of the other",
                param=field,
                code="context_length_exceeded",
            )
        return asked or (room if isinstance(request, ChatRequest) else min(room, COMPLETION_TOKENS))


def _numbered(deliver: Callable[[int, Event], None], number: int) -> Callable[[Event], None]:
    return lambda event: deliver(number, event)


def model_card(service: Service) -> dict[str, Any]:
    """Return the model's entry of `/v1/models`."""
    return {
        "id": service.name,
        "object": "model",
        "created": 0,
        "owned_by": "orthrus",
        "max_model_len": service.limits.context,
    }
