"""One vLLM engine in a process of its own: `python -m tests.vllm.serving REQUEST RESULT`, both JSON files.

The request names the model, the engine's arguments and a list of calls; the result holds, for each call, the tokens of
each answer, how many prompt tokens came from the prefix cache, what vLLM's own counters say of the drafts, how many
blocks the cache has, how the model is compiled, and which classes serve. Of a call with `"by_pass": true` it holds how
many tokens each pass wrote for each text, the prompt's own pass first.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main(request_file: str, result_file: str) -> None:
    """Run the calls of a request in order."""
    from vllm import LLM

    request = json.loads(Path(request_file).read_text())
    llm = LLM(request["model"], **request["engine"])
    results: list[dict[str, Any]] = []
    prompts: list[list[list[int]]] = []
    for call in request["calls"]:
        prompts.append(call.get("prompts") or continued(prompts, results, **call["continue"]))
        generate = by_pass if call.get("by_pass") else at_once
        results.append({**answer(llm, prompts[-1], call["sampling"], generate), **llm.collective_rpc(classes)[0]})
    Path(result_file).write_text(json.dumps(results))


def answer(
    llm: Any, prompts: list[list[int]], sampling: dict[str, Any], generate: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    """Generate for token prompts; counters are those of this call alone."""
    before = counters(llm)
    answered = generate(llm, [{"prompt_token_ids": ids} for ids in prompts], {"detokenize": False, **sampling})
    after = counters(llm)
    return {
        "prompts": prompts,
        **answered,
        "blocks": llm.llm_engine.vllm_config.cache_config.num_gpu_blocks,
        "compilation": llm.llm_engine.vllm_config.compilation_config.mode.name,
        **{name: subtract(after[name], before[name]) for name in after},
    }


def at_once(llm: Any, inputs: list[Any], sampling: dict[str, Any]) -> dict[str, Any]:
    """Let vLLM answer all prompts."""
    from vllm import SamplingParams

    outputs = llm.generate(inputs, SamplingParams(**sampling), use_tqdm=False)
    return {
        "tokens": [[list(one.token_ids) for one in output.outputs] for output in outputs],
        "cached": [output.num_cached_tokens for output in outputs],
    }


def by_pass(llm: Any, inputs: list[Any], sampling: dict[str, Any]) -> dict[str, Any]:
    """The same, one answer to a prompt, with how many tokens each pass wrote for it."""
    from vllm.sampling_params import RequestOutputKind

    from vllm import SamplingParams

    engine, written = llm.llm_engine, [[] for _ in inputs]
    for index, given in enumerate(inputs):
        engine.add_request(str(index), given, SamplingParams(output_kind=RequestOutputKind.DELTA, **sampling))
    while engine.has_unfinished_requests():
        for output in engine.step():
            written[int(output.request_id)].append(list(output.outputs[0].token_ids))
    return {
        "tokens": [[[token for tokens in passes for token in tokens]] for passes in written],
        "written": [[len(tokens) for tokens in passes if tokens] for passes in written],
    }


def classes(worker: Any) -> dict[str, Any]:
    """Name what a worker serves with; a drafter of ours holds no weights of its own."""
    runner = worker.model_runner
    found: dict[str, Any] = {"model_class": _name(runner.model)}
    if getattr(runner, "drafter", None) is not None:
        found["drafter_class"] = _name(runner.drafter)
        if (model := getattr(runner.drafter, "model", None)) is not None:
            found["draft_model_class"] = _name(model)
            found["drafter_weights"] = sum(weight.numel() for weight in model.parameters())
    return found


def _name(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def continued(prompts: list[Any], results: list[Any], *, call: int, kept: int) -> list[list[int]]:
    """An earlier call's prompts with the first `kept` tokens of their answers behind them."""
    answers = results[call]["tokens"]
    return [ids + tokens[0][:kept] for ids, tokens in zip(prompts[call], answers, strict=True)]


def counters(llm: Any) -> dict[str, Any]:
    """What vLLM counts of drafts so far: a number, or one for each position."""
    wanted = {
        "vllm:spec_decode_num_drafts": "drafts",
        "vllm:spec_decode_num_accepted_tokens": "accepted",
        "vllm:spec_decode_num_accepted_tokens_per_pos": "accepted_at",
        "vllm:num_preemptions": "preemptions",
    }
    found = [(wanted[metric.name], metric) for metric in llm.get_metrics() if metric.name in wanted]
    return {name: metric.values if name == "accepted_at" else metric.value for name, metric in found}


def subtract(after: Any, before: Any) -> Any:
    """The difference of two counters, or of two lists of them."""
    return [a - b for a, b in zip(after, before, strict=True)] if isinstance(after, list) else after - before


if __name__ == "__main__":
    main(*sys.argv[1:])
