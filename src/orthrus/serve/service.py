"""What a server serves: one model behind one loop, and how a request becomes jobs for it. Nothing of HTTP.

Prompts are encoded and checked here, so that a request that cannot be honoured never reaches the engine.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, Final

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orthrus.decode.allowed import block_of, drafter_for
from orthrus.decode.api import plan_of
from orthrus.decode.engine import Engine
from orthrus.decode.exact import Exact
from orthrus.decode.footprint import footprint
from orthrus.decode.options import Options
from orthrus.decode.text import decode, encode
from orthrus.errors import ConfigError
from orthrus.model.room import free_memory
from orthrus.policy.steps import Plan, slots
from orthrus.serve.calls import functions_of
from orthrus.serve.errors import Refused
from orthrus.serve.grammar import Grammars
from orthrus.serve.jobs import Event, Job
from orthrus.serve.logprobs import Spelling
from orthrus.serve.loop import Loop
from orthrus.serve.metrics import Metrics
from orthrus.serve.openai import ChatRequest, CompletionRequest, Request
from orthrus.serve.parts import CALL, END_THINK, THINK, Splitter

CONTEXT: Final = 8192
"""Positions per row, where neither the model nor the command line says less."""

MEMORY: Final = 0.45
"""Share of the free memory that a cache may take: plain requests have one of their own, and passes need the rest."""

_TAIL: Final = 24
"""Tokens at a prompt's end among which a template may have opened or closed a thought."""

COMPLETION_TOKENS: Final = 16
"""Tokens of a completion that does not say how many (OpenAI's default); a chat may fill its row."""


class Service:
    """A model, its tokenizer and the loop that decodes for all requests; `name` is the model's in requests."""

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
        """Prepare the engines' settings; `start` starts the thread. Raises ConfigError for a setting out of range.

        A server allows `context` tokens of prompt and text, `queue` completions that wait for a row, and `timeout`
        seconds for one (None for any).
        """
        longest: int = model.config.get_text_config().max_position_embeddings
        if context is not None and not 2 <= context <= longest:
            raise ConfigError(f"context must be from 2 to the model's {longest} tokens, found {context}")
        self.name, self.tokenizer = name, tokenizer
        drafted, plain = plan_of("orthrus", plan), plan_of("ar", None)
        block = block_of(model, drafter_for(model, drafted))
        scratch = drafted.scratch(block)
        self.footprint = footprint(model, terms=scratch)
        room = self.footprint.capacity(int(MEMORY * free_memory(model.device)), rows=rows) - scratch
        if room < (context or 2):
            raise ConfigError(
                f"{rows} rows of {context or 2} tokens must fit into memory, found room for rows of {max(room, 0)}: "
                "ask for fewer rows or a shorter context"
            )
        self.context, self._timeout = context or min(longest, CONTEXT, room), timeout
        self.metrics = Metrics(name, slots=slots(block))

        def engine(plan: Plan) -> Callable[[], Engine]:
            capacity = Engine.room(0, self.context, plan.scratch(block))
            return lambda: Engine(model, rows=rows, capacity=capacity, plan=plan, exact=exact)

        self.loop = Loop(
            {"orthrus": engine(drafted), "ar": engine(plain)},
            tokenizer=tokenizer,
            rows=rows,
            queue=queue,
            watcher=self.metrics,
        )
        self.metrics.follow(self.loop, positions=rows * self.context)
        self._eos = Options.of(model.generation_config).eos_token_id
        self._vocabulary: int = model.get_input_embeddings().weight.shape[0]
        self._grammars = Grammars(tokenizer, vocabulary=self._vocabulary, eos=self._eos)
        self._spell = lru_cache(maxsize=1 << 16)(self._grammars.spell)
        template = str(tokenizer.chat_template or "")
        self._thinks = THINK in template
        self._writes_hermes = CALL in template and "<function=" not in template
        end = tokenizer.convert_tokens_to_ids(END_THINK) if self._thinks else None
        self._end_of_thought = end if isinstance(end, int) and end != tokenizer.unk_token_id else None

    def start(self) -> None:
        self.loop.start()

    def close(self) -> None:
        """End the loop's thread; open jobs end with an error."""
        self.loop.close()

    def check_model(self, name: str) -> None:
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
        variables = request.chat_template_kwargs
        return [encode(self.tokenizer, request.chat(), tools=request.offered or None, chat_template_kwargs=variables)]

    def spelling(self, request: Request) -> Callable[[int], Spelling] | None:
        """Return how tokens are spelled, where a request asks for log probabilities."""
        return None if request.top is None else self._spell

    def splitter(self, request: Request, prompt_ids: Sequence[int]) -> Splitter:
        if not isinstance(request, ChatRequest):
            return Splitter()
        thinking, _ = self._thought(prompt_ids)
        tools = functions_of(request.offered) if request.offered else None
        return Splitter(thinks=self._thinks, thinking=thinking, tools=tools, single=request.single)

    def _thought(self, prompt_ids: Sequence[int]) -> tuple[bool, bool]:
        """Tell whether a prompt has opened a thought that the answer goes on with, and whether none is to come."""
        if not self._thinks:
            return False, True
        tail = decode(self.tokenizer, prompt_ids[-_TAIL:], skip_special_tokens=False)
        return tail.rfind(THINK) > tail.rfind(END_THINK), tail.rstrip().endswith(END_THINK)

    def _grammar(self, request: Request) -> str | None:
        """Return the grammar that a request's answers are held to; raises ConfigError for one that is none."""
        if not isinstance(request, ChatRequest):
            return None
        schema = None if request.response_format is None else request.response_format.schema_
        if not request.forced and schema is None:
            return None
        if request.ignore_eos:
            raise Refused("ignore_eos leaves a text that is held to a grammar no end: leave it out", param="ignore_eos")
        if request.offered and not self._writes_hermes:
            raise Refused(
                "a call that must be made, and a schema beside tools, need a chat template whose calls are JSON "
                "objects in <tool_call> and </tool_call> (Hermes' form), this model's template writes no such calls: "
                "ask with tool_choice 'auto' and without response_format",
                param="tool_choice" if request.forced else "response_format",
                code="unsupported_tool_form",
            )
        if request.forced:
            return self._grammars.calls(request.forced, single=request.single)
        if request.offered:
            functions = [tool["function"] for tool in request.offered]
            return self._grammars.calls(functions, single=request.single, otherwise=schema)
        return self._grammars.json(schema or {})

    def echo(self, request: CompletionRequest) -> list[str] | None:
        """Return each choice's prompt as text, where the request wants it repeated."""
        if not request.echo:
            return None
        texts = [p if isinstance(p, str) else decode(self.tokenizer, p) for p in request.prompt]
        return [text for text in texts for _ in range(request.choices)]

    def jobs(self, request: Request, prompts: Sequence[list[int]], deliver: Callable[[int, Event], None]) -> list[Job]:
        """Make a job for each choice of each prompt; `deliver` is called with a choice's number and its events.

        Raises Refused: a prompt outside the vocabulary or, with the tokens asked for, longer than the context.
        """
        deadline = None if self._timeout is None else self.loop.clock() + self._timeout
        made = []
        grammar = self._grammar(request)
        for prompt, prompt_ids in enumerate(prompts):
            limit = self._limit(request, prompt_ids)
            _, thought = self._thought(prompt_ids)
            after = None if thought else self._end_of_thought
            for choice in range(request.choices):
                number = prompt * request.choices + choice
                held = []
                if grammar is not None:
                    held = [self._grammars.constraint(grammar, prompt=len(prompt_ids), after=after)]
                if choice == 0 or held:  # a constraint follows one text
                    options = request.options(eos_token_id=self._eos, max_new_tokens=limit, processors=held)
                job = Job(
                    prompt_ids=prompt_ids,
                    options=options,
                    top=request.top,
                    deliver=partial(deliver, number),
                    index=number,
                    mode=request.orthrus.mode,
                    deadline=deadline,
                )
                made.append(job)
        return made

    def _limit(self, request: Request, prompt_ids: Sequence[int]) -> int:
        field = "messages" if isinstance(request, ChatRequest) else "prompt"
        if not prompt_ids:
            raise Refused("the prompt must hold at least one token, found none", param=field)
        if max(prompt_ids) >= self._vocabulary:
            raise Refused(f"prompt tokens must be ids below {self._vocabulary}, found {max(prompt_ids)}", param=field)
        biased = max(map(int, request.logit_bias or {}), default=0)
        if biased >= self._vocabulary:
            raise Refused(f"logit_bias must name tokens below {self._vocabulary}, found {biased}", param="logit_bias")
        room = self.context - len(prompt_ids)
        asked = request.limit
        if room < 1 or (asked or 1) > room:
            raise Refused(
                f"prompt and completion have {self.context} tokens here, found {len(prompt_ids)} of the prompt "
                f"and {asked or 1} to write: shorten the one or ask for fewer of the other",
                param=field,
                code="context_length_exceeded",
            )
        return asked or (room if isinstance(request, ChatRequest) else min(room, COMPLETION_TOKENS))


def model_card(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": 0,
        "owned_by": "orthrus",
        "max_model_len": service.context,
    }
