"""Quality of a precision: figures by hand on made-up lines, and end to end on a tiny model."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orthrus.bench import quality
from orthrus.bench.quality import Quality, Summary, compared
from orthrus.bench.rounding import in_blocks, round_as
from orthrus.bench.session import Job
from orthrus.bench.suites import read_suite
from orthrus.bench.texts import Writer
from orthrus.cli import main
from orthrus.data.records import read_records
from orthrus.decode.text import encode
from orthrus.errors import ConfigError, DataError

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def line(dtype: str, id: str, **more: Any) -> dict[str, Any]:
    """A line of two tokens, both agreed on."""
    labels = {"kind": "quality", "provenance": "p", "configuration": "c", "suite": "s", "domain": "d"}
    figures = {"tokens": 2, "loss": 0.5, "divergence": 0.0, "agreed": 2, "right": None}
    return {**labels, "dtype": dtype, "id": id, **figures, **more}


def summaries(records: list[dict[str, Any]]) -> list[Summary]:
    return quality.summaries(Quality.read(records, where="f"), where="f")


def test_figures_are_summed_over_tokens_and_compared_with_float32_s_on_the_same_answers() -> None:
    """Long answers weigh more; the ratio is of perplexities."""
    plain = [line("float32", "a", right=True), line("float32", "b", tokens=6, loss=0.1, agreed=6, right=True)]
    eight = [
        line("int8", "a", loss=0.7, divergence=0.4, agreed=1, right=True),
        line("int8", "b", tokens=6, loss=0.2, divergence=0.2, agreed=6, right=False),
    ]
    base, found = summaries([*plain, *eight])
    assert (base.ratio.value, base.divergence, base.agreement, base.right) == (1, 0, 1, 1)
    assert found.perplexity == pytest.approx(math.exp((2 * 0.7 + 6 * 0.2) / 8))
    assert found.ratio.value == pytest.approx(found.perplexity / base.perplexity)
    assert found.ratio.low <= found.ratio.value <= found.ratio.high
    assert found.divergence == pytest.approx((2 * 0.4 + 6 * 0.2) / 8)
    assert (found.prompts, found.tokens, found.agreement, found.right) == (2, 8, 7 / 8, 0.5)


def test_lines_without_float32_s_or_without_a_field_are_errors() -> None:
    with pytest.raises(DataError, match="float32"):
        summaries([line("int8", "a")])
    broken = line("int8", "a")
    del broken["loss"]
    with pytest.raises(DataError, match="loss"):
        summaries([broken])


def test_a_model_is_compared_token_by_token_with_the_whole_text_read(loaded: Loaded) -> None:
    """Against passes over prefixes of the text, one for each token; a model agrees with itself."""
    model, _ = loaded
    prompt, answer = [5, 6, 7], [8, 9, 10, 11]
    with torch.inference_mode():
        rows = [model(input_ids=torch.tensor([prompt + answer[:t]])).logits[0, -1].log_softmax(-1) for t in range(4)]
    loss = -sum(float(row[token]) for row, token in zip(rows, answer, strict=True)) / 4
    agreed = sum(int(row.argmax()) == token for row, token in zip(rows, answer, strict=True))
    assert compared(model, model, prompt, answer) == (pytest.approx(loss, rel=1e-5), 0, agreed)


def test_the_command_measures_reports_and_continues(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """float32 runs unasked and agrees with itself; what is in the file is not measured again."""
    output = tmp_path / "quality.jsonl"
    arguments = ["bench", "quality", str(model_folder), "--suite", "synthetic:maths", "--limit", "2"]
    arguments += ["--max-new-tokens", "5", "-o", str(output), "--dtype"]
    assert main([*arguments, "bfloat16"]) == 0
    head, *rest = read_records(output)
    assert head["kind"] == "provenance"
    assert [(r["dtype"], r["agreed"] == r["tokens"], r["divergence"]) for r in rest[:2]] == [("float32", True, 0)] * 2
    assert [(r["dtype"], r["divergence"] > 0, r["right"]) for r in rest[2:]] == [("bfloat16", True, False)] * 2
    assert main([*arguments, "float32,bfloat16"]) == 0
    assert len(read_records(output)) == 5
    assert main([*arguments, "bfloat16,float16"]) == 0
    assert [r["dtype"] for r in read_records(output)[5:] if r["kind"] == "quality"] == ["float16"] * 2
    capsys.readouterr()
    assert main(["bench", "report", str(output), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["quality"]
    assert [figure["dtype"] for figure in figures] == ["float32", "bfloat16", "float16"]
    assert main(["bench", "report", str(output)]) == 0
    assert "Quality" in capsys.readouterr().out
    assert main([*arguments, "int9"]) == 2


def test_forms_of_llama_cpp_are_lines_like_precisions(tmp_path: Path) -> None:
    """Each from the float32 model, whose own lines stay; coarser forms are further from it."""
    pytest.importorskip("gguf")
    output = tmp_path / "quality.jsonl"
    arguments = ["bench", "quality", "nano", "--suite", "synthetic:maths", "--limit", "1"]
    arguments += ["--max-new-tokens", "5", "-o", str(output), "--dtype", "float32", "--form"]
    assert main([*arguments, "q8_0,q4_0"]) == 0
    found = {r["dtype"]: r["divergence"] for r in read_records(output) if r["kind"] == "quality"}
    assert found["float32"] == 0 < found["q8_0"] < found["q4_0"]
    assert main([*arguments, "q9_9"]) == 2


def test_a_form_rounds_weights_and_inputs_as_gguf_does() -> None:
    """In blocks of 32; inputs in float16 scales, too, rows of zeros to zeros."""
    quants = pytest.importorskip("gguf").quants
    kind = pytest.importorskip("gguf").GGMLQuantizationType.Q8_0
    model, x = nn.Sequential(nn.Linear(64, 8)), torch.randn(3, 64) * torch.logspace(-2, 2, 3)[:, None]
    x[1, :32] = 0
    rounded = torch.from_numpy(quants.dequantize(quants.quantize(x.numpy(), kind), kind))
    torch.testing.assert_close(in_blocks(x), rounded, rtol=1e-6, atol=0)
    weight = model[0].weight.detach().clone()
    round_as("q8_0", model)
    assert 0 < float((model[0].weight - weight).abs().max()) < float(weight.abs().max()) / 200
    with torch.inference_mode():
        assert torch.equal(model(x), nn.functional.linear(in_blocks(x), model[0].weight, model[0].bias))
    with pytest.raises(ConfigError, match="blocks of 32"):
        round_as("q8_0", nn.Sequential(nn.Linear(72, 8)))


def test_answers_that_nothing_can_judge_are_not_written(
    loaded: Loaded, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other precisions only read then."""
    written: list[list[int]] = []
    original: Callable[..., list[int]] = Writer.greedy

    def greedy(self: Any, prompt: list[int]) -> list[int]:
        written.append(prompt)
        return original(self, prompt)

    monkeypatch.setattr(Writer, "greedy", greedy)
    job = Job(model="tiny", suites=(str(prompt_file),), limit=1, dtypes=("bfloat16",), max_new_tokens=3)
    quality.run(job, tmp_path / "out.jsonl", load=lambda _: loaded)
    assert written == [encode(loaded[1], read_suite(str(prompt_file))[0].messages)]
    with pytest.raises(ConfigError, match="int9"):
        Job(model="tiny", suites=("synthetic:maths",), dtypes=("int9",))
