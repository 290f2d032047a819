"""One vLLM engine in a process of its own: `python -m tests.vllm.serving REQUEST RESULT`, both JSON files.

The request names the model, the engine's arguments and a list of calls; the result holds, for each call, the tokens of
each answer, how many prompt tokens came from the prefix cache, what vLLM's own counters say of the drafts, how many
blocks the cache has, how the model is compiled, and which classes serve.
"""

import json
import sys
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
        results.append({**answer(llm, prompts[-1], call["sampling"]), **llm.collective_rpc(classes)[0]})
    Path(result_file).write_text(json.dumps(results))


def answer(llm: Any, prompts: list[list[int]], sampling: dict[str, Any]) -> dict[str, Any]:
    """Generate for token prompts; counters are those of this call alone."""
    from vllm import SamplingParams

    before = counters(llm)
    inputs = [{"prompt_token_ids": ids} for ids in prompts]
    outputs = llm.generate(inputs, SamplingParams(detokenize=False, **sampling), use_tqdm=False)
    after = counters(llm)
    return {
        "prompts": prompts,
        "tokens": [[list(one.token_ids) for one in output.outputs] for output in outputs],
        "cached": [output.num_cached_tokens for output in outputs],
        "blocks": llm.llm_engine.vllm_config.cache_config.num_gpu_blocks,
        "compilation": llm.llm_engine.vllm_config.compilation_config.mode.name,
        **{name: subtract(after[name], before[name]) for name in after},
    }


def classes(worker: Any) -> dict[str, Any]:
    """Name what a worker serves with; a drafter of ours holds no weights of its own."""
    runner = worker.model_runner
    found: dict[str, Any] = {"model_class": _name(runner.model)}
    if getattr(runner, "drafter", None) is not None:
        found["drafter_class"] = _name(runner.drafter)
        found["drafter_weights"] = sum(weight.numel() for weight in runner.drafter.model.parameters())
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
