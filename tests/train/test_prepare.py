"""`orthrus prepare`: every source and every kind of answers, resumed, shared out, and refused with words that help."""

import json
import os
import random
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

import orthrus
from orthrus.checkpoints import load as loading
from orthrus.cli import main
from orthrus.data import shards
from orthrus.data.packing import PackedRows, load_rows
from orthrus.data.remote import Server, served_answers
from orthrus.data.responses import LOOP_PERIOD, Answering, Prompt, answer, before_loop
from orthrus.errors import ConfigError, DataError
from orthrus.kernels import packed
from orthrus.train import ranks, start
from orthrus.train.corpus import over_and_over
from orthrus.train.drafting import drafting
from orthrus.train.prepare import Prepared, prepare, train_prompts
from orthrus.train.ranks import Ranks
from orthrus.train.sections import ViewRecipe
from orthrus.train.sources import JsonlSource
from orthrus.train.start import load_backbone
from tests.families import perturb
from tests.train.ranks_of import in_processes
from tests.train.tiny import tiny_tokenizer, view_recipe

QUESTIONS = [{"question": f"what is {n} and {n}?", "answer": f"it is {2 * n}.", "id": n} for n in range(6)]
COLUMNS = {"prompt": "question", "answer": "answer"}


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A directory that `datasets` can load: six questions with answers."""
    return written(tmp_path / "questions", QUESTIONS)


def written(folder: Path, records: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def recipe_of(backbone: Path, output: Path, dataset: Path | None = None, **more: Any) -> ViewRecipe:
    """A recipe whose prompts come from a dataset, or from the generator."""
    sections: dict[str, Any] = {"responses": {"prompts": 6, "max_new_tokens": 8, "rows": 4}, **more}
    if dataset is not None:
        source = {"kind": "dataset", "name": str(dataset), "columns": COLUMNS, "weight": 1.0, "licence": "CC0-1.0"}
        sections["data"] = {"sources": [source | sections.pop("source", {})]}
    return view_recipe(backbone, output, **sections)


def made(recipe: ViewRecipe, tokenizer: PreTrainedTokenizerFast) -> Prepared:
    """Prepare with the backbone loaded where it is needed."""
    own = recipe.answers.by == "backbone"
    model = load_backbone(recipe, torch.device("cpu"))[0] if own else None
    return prepare(recipe, tokenizer, model, ranks=Ranks("cpu"))


def texts_of(rows: PackedRows, tokenizer: PreTrainedTokenizerFast) -> set[tuple[str, str]]:
    """Every document of a packed set as (prompt, answer)."""
    found = set()
    for row in range(len(rows)):
        for document in range(rows.document[row].max() + 1):
            here = rows.document[row] == document
            ids, answer = rows.token_ids[row][here], rows.answer[row][here]
            found.add((tokenizer.decode(ids[~answer]), tokenizer.decode(ids[answer])))
    return found


def manifest_of(output: Path) -> dict[str, Any]:
    """The manifest of the training rows."""
    manifest: dict[str, Any] = json.loads((output / "data" / "train" / "manifest.json").read_text())
    return manifest


def expected_prompt(tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    """A question as the chat template puts it."""
    chat = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))


@pytest.mark.parametrize("streaming", [True, False])
def test_answers_that_a_dataset_gives_are_taken_as_they_are(
    backbone: Path,
    dataset: Path,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    streaming: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Column mapping, chat template, answer and end token; the manifest says where they are from."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    recipe = recipe_of(
        backbone,
        tmp_path / "run",
        dataset,
        answers={"by": "given"},
        responses={"prompts": 6, "max_new_tokens": 40},
        source={"streaming": streaming},
    )
    rows = made(recipe, tokenizer).rows
    expected = {
        (expected_prompt(tokenizer, str(q["question"])), f"{q['answer']}{tokenizer.eos_token}") for q in QUESTIONS
    }
    assert texts_of(rows, tokenizer) == expected
    manifest = manifest_of(tmp_path / "run")
    assert (manifest["prompts"], manifest["documents"], manifest["answers_cut_short"]) == (6, 6, 0)
    assert manifest["answer_tokens"] == int(rows.answer.sum())
    assert sum(manifest["answer_lengths_up_to"].values()) == 6
    top = dict(manifest["tokens_most_frequent"])
    assert top[tokenizer.eos_token_id] == 6
    [source] = manifest["sources"]
    assert (source["licence"], source["dataset"], source["revision"]) == ("CC0-1.0", str(dataset), None)


def test_the_backbone_answers_a_dataset(
    backbone: Path, dataset: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Every prompt is there once, with an answer of the backbone's own; a second call makes nothing again."""
    recipe = recipe_of(backbone, tmp_path / "run", dataset)
    found = texts_of(made(recipe, tokenizer).rows, tokenizer)
    assert {prompt for prompt, _ in found} == {expected_prompt(tokenizer, str(q["question"])) for q in QUESTIONS}
    before = manifest_of(tmp_path / "run")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "data").rglob("*.np*")}
    made(recipe, tokenizer)
    assert manifest_of(tmp_path / "run") == before
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_an_earlier_view_drafts_the_same_answers(
    backbone: Path, dataset: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Same words, counted passes; the view to be trained gets its own tensors back."""
    plain = texts_of(made(recipe_of(backbone, tmp_path / "plain", dataset), tokenizer).rows, tokenizer)
    earlier, _ = load_backbone(recipe_of(backbone, tmp_path / "none", dataset), torch.device("cpu"))
    perturb(earlier)
    orthrus.save(earlier, tmp_path / "earlier")
    recipe = recipe_of(backbone, tmp_path / "drafted", dataset, answers={"view": str(tmp_path / "earlier")})
    model, _ = load_backbone(recipe, torch.device("cpu"))
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = prepare(recipe, tokenizer, model, ranks=Ranks("cpu")).rows
    assert texts_of(rows, tokenizer) == plain
    manifest = manifest_of(tmp_path / "drafted")
    assert manifest["drafted_by"] == str(tmp_path / "earlier")
    assert 0 < manifest["tokens_per_forward"] < 6
    with drafting(model, recipe.answers.view) as decode:
        assert decode == "auto"
        twin = {name: tensor for name, tensor in model.state_dict().items() if "diffusion" in name}
        assert any(not torch.equal(tensor, own[name]) for name, tensor in twin.items())
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())


def test_a_view_drafts_in_the_run_s_dtype(backbone: Path, dataset: Path, tmp_path: Path) -> None:
    """Frozen weights are in bfloat16 there and the view to be trained in float32, which it is again afterwards."""
    run = {"dtype": "bfloat16"}
    model, _ = load_backbone(recipe_of(backbone, tmp_path / "run", dataset, run=run), torch.device("cpu"))
    orthrus.save(model, tmp_path / "earlier")
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with drafting(model, str(tmp_path / "earlier")):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("view", [None, "earlier"])
def test_answers_are_written_by_the_layers_of_a_loaded_model(
    view: str | None, backbone: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load_backbone(recipe_of(backbone, tmp_path / "run", dataset), torch.device("cpu"))
    kinds, attributes = [type(module) for module in model.modules()], [set(vars(module)) for module in model.modules()]
    if view is not None:
        orthrus.save(model, tmp_path / view)
    monkeypatch.setattr(packed, "copy_for", lambda weight, *, half=True: packed.Copy(weight.dtype, "torch"))
    monkeypatch.setattr(packed, "tune", lambda model: None)  # what is faster depends on the machine
    with drafting(model, None if view is None else str(tmp_path / view)):
        assert any(isinstance(module, packed.PackedLinear) for module in model.modules())
    assert [type(module) for module in model.modules()] == kinds
    assert [set(vars(module)) for module in model.modules()] == attributes


def test_answers_do_not_depend_on_who_drafted_them(
    backbone: Path, dataset: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Rows made with an earlier view serve a recipe without one: they are the same rows."""
    first = recipe_of(backbone, tmp_path / "run", dataset)
    before = texts_of(made(first, tokenizer).rows, tokenizer)
    second = recipe_of(backbone, tmp_path / "run", dataset, answers={"view": "nowhere, and never looked for"})
    assert texts_of(made(second, tokenizer).rows, tokenizer) == before


@dataclass
class Stub:
    """What a local server of the standard library was asked, and what it says."""

    url: str
    status: int = 200
    reply: bytes | None = None
    promised: int | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Stub]:
    """An OpenAI-compatible server that answers every prompt with its number of tokens."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            stub.asked.append(body | {"path": self.path})
            text = f"{len(body['prompt'])} it is"
            reply = json.dumps({"choices": [{"text": text, "finish_reason": "stop"}]}).encode()
            self.send_response(stub.status)
            if stub.promised is not None:
                self.send_header("Content-Length", str(stub.promised))
            self.end_headers()
            self.wfile.write((stub.reply or reply) if stub.status == 200 else b"no such model")

        def log_message(self, *_: Any) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stub = Stub(f"http://127.0.0.1:{listening.server_port}/v1/")
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    yield stub
    listening.shutdown()
    listening.server_close()
    thread.join()


def test_a_server_answers_token_ids_greedily(
    backbone: Path, dataset: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, server: Stub
) -> None:
    """The server is asked with the template's own tokens; its text is encoded, ended and packed."""
    recipe = recipe_of(
        backbone,
        tmp_path / "run",
        dataset,
        answers={"by": "server", "url": server.url, "served_as": "tiny"},
        responses={"prompts": 6, "max_new_tokens": 40, "rows": 2},
    )
    found = texts_of(made(recipe, tokenizer).rows, tokenizer)
    prompts = [expected_prompt(tokenizer, str(q["question"])) for q in QUESTIONS]
    lengths = {prompt: len(tokenizer(prompt)["input_ids"]) for prompt in prompts}
    assert found == {(prompt, f"{lengths[prompt]} it is{tokenizer.eos_token}") for prompt in prompts}
    assert {tokenizer.decode(body["prompt"]) for body in server.asked} == set(prompts)
    assert {(b["path"], b["model"], b["temperature"]) for b in server.asked} == {("/v1/completions", "tiny", 0)}


def test_a_server_that_refuses_is_named(
    backbone: Path, dataset: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, server: Stub
) -> None:
    """What the server says reaches the user, without asking again and again."""
    server.status = 404
    recipe = recipe_of(
        backbone,
        tmp_path / "run",
        dataset,
        answers={"by": "server", "url": server.url},
        responses={"prompts": 6, "rows": 1},
    )
    with pytest.raises(DataError, match=r"/v1/completions: a server .* status 404: no such model"):
        made(recipe, tokenizer)
    assert len(server.asked) <= 6


@pytest.mark.parametrize("reply", [b"<html>", b"[]", b'{"choices": []}', b'{"choices": [{"text": null}]}'])
def test_a_reply_that_is_no_completion_is_not_asked_for_again(
    tokenizer: PreTrainedTokenizerFast, server: Stub, reply: bytes
) -> None:
    """The server is there and answers; it would say the same five times."""
    server.reply = reply
    asked = Server(url=server.url, model="tiny", pause=0.0)
    with pytest.raises(DataError, match=r"/v1/completions: a completion with choices\[0\]\.text is required, found"):
        list(served_answers(asked, tokenizer, PROMPTS[:1], HOW))
    assert len(server.asked) == 1


def test_a_reply_that_breaks_off_is_asked_for_again(tokenizer: PreTrainedTokenizerFast, server: Stub) -> None:
    """As a server gives it that ends or is restarted; after the last attempt it is an error with words."""
    server.promised = 9999
    asked = Server(url=server.url, model="tiny", attempts=2, pause=0.0)
    with pytest.raises(DataError, match=r"a server that completes prompts .* IncompleteRead"):
        list(served_answers(asked, tokenizer, PROMPTS[:1], HOW))
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    "url", ["myhost/v1", "myhost:8000/v1", "http:///v1", "http://myhost:port/v1", "http://[myhost/v1"]
)
def test_an_address_that_is_none_is_named(tokenizer: PreTrainedTokenizerFast, url: str) -> None:
    """At once, and not as an error of urllib."""
    asked = Server(url=url, model="tiny", attempts=1)
    with pytest.raises(DataError, match=rf"answers\.url must be an address .* found '{re.escape(url)}'"):
        list(served_answers(asked, tokenizer, PROMPTS[:1], HOW))


HOW = Answering(max_new_tokens=4, rows=2, row_tokens=32)
PROMPTS = [Prompt([5, 6, n], "x") for n in range(7, 17)]


def copied(prompts: Any) -> Any:
    """Answer every prompt with its own tokens."""
    from orthrus.data.responses import joined

    return [joined(p.token_ids, p.token_ids) for p in prompts]


def test_answers_that_are_there_are_not_written_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stopped in the third shard of four, the next run writes two; the documents are all there, in order."""
    asked: list[int] = []

    def dies(prompts: Any) -> Any:
        asked.append(len(prompts))
        for number, document in enumerate(copied(prompts)):
            if len(asked) == 1 and number == 7:
                raise KeyboardInterrupt
            yield document

    ask = {"about": {"a": 1}, "size": 3}
    with pytest.raises(KeyboardInterrupt):
        shards.write_answers(tmp_path, PROMPTS, dies, **ask)
    capsys.readouterr()
    shards.write_answers(tmp_path, PROMPTS, dies, label="train", **ask)
    assert asked == [10, 4]
    assert [line.split("  ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "train prompts 9/10",
        "train prompts 10/10",
    ]
    documents = shards.read_answers(tmp_path, PROMPTS)
    assert [d.token_ids.tolist() for d in documents] == [[*p.token_ids, *p.token_ids] for p in PROMPTS]


def test_more_prompts_are_added_to_the_answers_that_are_there(tmp_path: Path) -> None:
    """A prompt that comes twice is asked once, in whatever order prompts come; each gets its own answer."""
    asked: list[Prompt] = []

    def writes(prompts: Any) -> Any:
        asked.extend(prompts)
        return copied(prompts[::-1])

    shards.write_answers(tmp_path, PROMPTS[:4], writes, about={})
    mixed = [PROMPTS[8], *PROMPTS[:2], PROMPTS[8], PROMPTS[5]]
    shards.write_answers(tmp_path, mixed, writes, about={})
    assert asked == [*PROMPTS[:4], PROMPTS[8], PROMPTS[5]]
    found = [d.token_ids[:3].tolist() for d in shards.read_answers(tmp_path, [*mixed, PROMPTS[9]])]
    assert found == [p.token_ids for p in mixed]


def test_processes_share_the_prompts(tmp_path: Path) -> None:
    """Two processes have every prompt answered once, between them."""
    wrote: list[list[int]] = [[], []]

    def writer(rank: int) -> Callable[[Any], Any]:
        def write(prompts: Any) -> Any:
            wrote[rank].extend(p.token_ids[-1] for p in prompts)
            return copied(prompts)

        return write

    for rank in (0, 1):
        shards.write_answers(tmp_path, PROMPTS, writer(rank), about={}, share=(rank, 2), size=3)
    assert wrote == [[7, 9, 11, 13, 15], [8, 10, 12, 14, 16]]
    assert len(shards.read_answers(tmp_path, PROMPTS)) == 10


def test_whoever_stops_has_answered_a_sample() -> None:
    """Prompts are sorted by length within windows; those of a window follow one another, and none is lost."""
    lengths = random.Random(0).choices(range(1, 31), k=100)
    usable = [len(prompt.token_ids) for prompt in HOW.usable(Prompt([0] * length) for length in [*lengths, 40, 0])]
    windows = [lengths[at : at + 16 * HOW.rows] for at in range(0, 100, 16 * HOW.rows)]
    assert usable == [length for window in windows for length in sorted(window)]


def test_an_answer_ends_where_it_begins_to_loop() -> None:
    """The second repetition is kept, and nothing behind it; a short repetition may be meant."""
    text = [1, 2, 3]
    assert before_loop([*text, *[7] * 11]) == 14
    assert before_loop([*text, *[7] * 12]) == 5
    assert before_loop([*text, *[7, 8, 9, 6] * 3]) == 3 + 8
    assert before_loop([*text, *[7, 8, 9, 6] * 2, 7, 8, 9]) == 14
    assert before_loop([*text, *[7, 8] * 6, 1, 1]) == 17
    assert before_loop([*text, *[7, 8] * 6, 1, 1], added=3) == 7  # seen within what is new
    long = list(range(10, 10 + LOOP_PERIOD))
    assert before_loop(long * 3) == 2 * LOOP_PERIOD
    assert before_loop([*long, 9] * 3) == 3 * LOOP_PERIOD + 3


def test_a_loop_is_not_written_to_its_end(backbone: Path, dataset: Path, tmp_path: Path) -> None:
    """Answers of a backbone that always says the same thing are two words long, whatever they might be."""
    model, _ = load_backbone(recipe_of(backbone, tmp_path / "run", dataset), torch.device("cpu"))
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(torch.zeros_like(head.weight), requires_grad=False)
    model.generation_config.eos_token_id = 5
    how = Answering(max_new_tokens=100, rows=2, row_tokens=200)
    prompts = [Prompt([7] * length) for length in (3, 5, 8, 4)]
    found = [document.token_ids[document.answer].tolist() for document in answer(model, prompts, how)]
    assert found == [[0, 0]] * 4


def prepare_in(rank: int, backbone: Path, output: Path, dataset: Path) -> None:
    """What each of two processes does."""
    recipe = recipe_of(backbone, output, dataset)
    model, tokenizer = load_backbone(recipe, torch.device("cpu"))
    shards.write_answers.__kwdefaults__["size"] = 2
    prepare(recipe, tokenizer, model, ranks=Ranks("cpu"))


def test_two_processes_prepare_what_one_does(
    backbone: Path, dataset: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Rows are equal, array for array; each process answered a part."""
    alone = made(recipe_of(backbone, tmp_path / "one", dataset), tokenizer).rows
    (tmp_path / "two").mkdir()
    assert in_processes(2, prepare_in, backbone, tmp_path / "two", dataset) == [0, 0]
    both = load_rows(tmp_path / "two" / "data" / "train", tokenizer=tokenizer)
    assert texts_of(both, tokenizer) == texts_of(alone, tokenizer)
    shares = [(tmp_path / "two" / "data" / "train-answers").glob(f"{rank:03d}-*.npz") for rank in (0, 1)]
    assert [sum(len(np.load(shard)["lengths"]) for shard in share) for share in shares] == [3, 3]


def test_a_damaged_shard_is_named_and_nothing_else_is_lost(tmp_path: Path) -> None:
    """The message says which file to delete; the others stay."""
    shards.write_answers(tmp_path, PROMPTS, copied, about={}, size=3)
    path = tmp_path / "000-00001.npz"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match=r"00001\.npz: a shard of answers is required"):
        shards.read_answers(tmp_path, PROMPTS)
    path.unlink()
    shards.write_answers(tmp_path, PROMPTS, copied, about={}, size=3)
    assert len(shards.read_answers(tmp_path, PROMPTS)) == 10


def test_other_settings_do_not_take_up_old_answers(tmp_path: Path) -> None:
    """Thinking switched on half-way is refused by name; so is a folder that does not say what it is made from."""
    shards.write_answers(tmp_path / "a", PROMPTS, copied, about={"thinking": False}, size=3)
    with pytest.raises(DataError, match=r"these differ: thinking \(False there, True here\)"):
        shards.write_answers(tmp_path / "a", PROMPTS, copied, about={"thinking": True}, size=3)
    (tmp_path / "a" / "about.json").unlink()
    with pytest.raises(DataError, match=r"about\.json"):
        shards.write_answers(tmp_path / "a", PROMPTS, copied, about={"thinking": False}, size=3)


def test_more_prompts_make_new_rows_of_old_answers_and_new_ones(
    backbone: Path, dataset: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    few = made(recipe_of(backbone, tmp_path / "run", dataset, responses={"prompts": 3}), tokenizer).rows
    folder = tmp_path / "run" / "data" / "train-answers"
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("*.npz")}
    more = made(recipe_of(backbone, tmp_path / "run", dataset, responses={"prompts": 6}), tokenizer).rows
    assert texts_of(few, tokenizer) < texts_of(more, tokenizer)
    assert len(texts_of(more, tokenizer)) == 6
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    with pytest.raises(DataError, match=r"max_new_tokens \(\d+ there, 5 here\)"):
        made(recipe_of(backbone, tmp_path / "run", dataset, responses={"max_new_tokens": 5}), tokenizer)


THOUGHT = {"question": "why?", "answer": "<think>\nhm\n</think>\n\nbecause"}
EMPTY_THOUGHT = {"question": "how?", "answer": "<think>\n\n</think>\n\nso"}


@pytest.mark.parametrize(
    ("records", "answers", "words"),
    [
        ([QUESTIONS[0], THOUGHT], {}, r"set \(train\), row 1: an answer that does not .*, as .* row 0 has it, found"),
        ([THOUGHT, QUESTIONS[0]], {}, r"set \(train\), row 1: an answer that thinks .*, as .* row 0 has it, found"),
        ([QUESTIONS[0], {"question": "why?", "answer": " "}], {}, r"set \(train\), row 1: an answer is required"),
        ([{"question": "why?"}], {}, "the columns answer are required, found question"),
        ([{"question": 3, "answer": "x"}], {}, "row 0: a text is required, found 3"),
        ([QUESTIONS[0]], {"thinking": "on"}, "needs a chat template that knows enable_thinking"),
    ],
)
def test_answers_that_do_not_fit_are_refused(
    backbone: Path,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    records: list[dict[str, Any]],
    answers: dict[str, Any],
    words: str,
) -> None:
    """A mix of thinking and not, empty answers, missing columns, a template without the setting."""
    recipe = recipe_of(
        backbone, tmp_path / "run", written(tmp_path / "set", records), answers={"by": "given"} | answers
    )
    with pytest.raises((DataError, ConfigError), match=words):
        made(recipe, tokenizer)


@pytest.mark.parametrize(("thinking", "good"), [("on", THOUGHT), ("off", EMPTY_THOUGHT)])
def test_thinking_is_the_templates_and_the_answers_alike(
    backbone: Path, tmp_path: Path, thinking: str, good: dict[str, Any]
) -> None:
    """The template is told, the manifest says it, and answers of the other kind are refused."""
    knowing = tiny_tokenizer()
    knowing.chat_template = (
        "{% for m in messages %}{{ m['content'] }}|{% endfor %}"
        "{% if enable_thinking %}with{% else %}without{% endif %}:"
    )
    recipe = recipe_of(
        backbone,
        tmp_path / "run",
        written(tmp_path / "good", [good]),
        answers={"by": "given", "thinking": thinking},
        responses={"prompts": 1, "max_new_tokens": 99},
    )
    [(prompt, answer)] = texts_of(made(recipe, knowing).rows, knowing)
    assert prompt == good["question"] + ("|with:" if thinking == "on" else "|without:")
    assert answer == good["answer"] + str(knowing.eos_token)
    assert manifest_of(tmp_path / "run")["thinking"] == thinking
    other = written(tmp_path / "other", [THOUGHT, EMPTY_THOUGHT])
    mixed = recipe_of(backbone, tmp_path / "mixed", other, answers={"by": "given", "thinking": thinking})
    with pytest.raises(DataError, match=r"as answers\.thinking has it"):
        made(mixed, knowing)


def test_prompts_longer_than_a_row_are_counted_and_not_all_of_them_may_be(
    backbone: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """One of three does not fit and the manifest says so; where none fits, that is an error."""
    long = {"question": "seven " * 300, "answer": "x"}
    sources = written(tmp_path / "set", [*QUESTIONS[:2], long])
    made(recipe_of(backbone, tmp_path / "run", sources, answers={"by": "given"}, responses={"prompts": 3}), tokenizer)
    manifest = manifest_of(tmp_path / "run")
    assert (manifest["prompts"], manifest["prompts_too_long"]) == (3, 1)
    hopeless = written(tmp_path / "long", [long])
    with pytest.raises(DataError, match=r"shorter than data\.row_tokens \(200\) is required"):
        made(recipe_of(backbone, tmp_path / "none", hopeless, answers={"by": "given"}), tokenizer)


def test_given_answers_are_checked_in_the_order_of_their_sources(
    backbone: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The first record settles it, not the first after shuffling; the one that differs is named by file and line."""
    sources = []
    for name, answers in {"plain": ["a", "b", "c", "d"], "mixed": ["e", "<think>hm</think> f"]}.items():
        path = tmp_path / f"{name}.jsonl"
        chats = [[{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}] for answer in answers]
        path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
        sources.append({"kind": "jsonl", "path": str(path), "weight": float(len(answers))})
    for seed in range(4):
        recipe = recipe_of(backbone, tmp_path / "run", answers={"by": "given"}, data={"sources": sources, "seed": seed})
        with pytest.raises(DataError, match=r"mixed\.jsonl:2: .*, as .*plain\.jsonl:1 has it"):
            made(recipe, tokenizer)


def test_a_chat_that_comes_again_answers_at_another_turn(
    backbone: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Four chats of two answers each give eight prompts, all different, where eight are asked for."""
    said = [
        {"messages": [{"role": role, "content": f"{n} {role} {i}"} for i in (1, 2) for role in ("user", "assistant")]}
        for n in ("one", "two", "three", "four")
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in said))
    source = {"kind": "jsonl", "path": str(tmp_path / "chats.jsonl"), "weight": 1.0}
    recipe = recipe_of(backbone, tmp_path / "run", data={"sources": [source]}, responses={"prompts": 8})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompts = train_prompts(recipe, tokenizer)
    assert len({tuple(prompt.token_ids) for prompt in prompts}) == 8
    more = recipe_of(backbone, tmp_path / "run", data={"sources": [source]}, responses={"prompts": 12})
    with pytest.warns(UserWarning, match="asks for 12 prompts, the sources hold 8 different ones"):
        assert len(train_prompts(more, tokenizer)) == 12


def written_recipe(path: Path, backbone: Path, dataset: Path, *, by: str = "given", device: str = "cpu") -> Path:
    """A recipe as a file."""
    text = f"""
        kind = "view"
        model = {{ backbone = "{backbone}", block_size = 6 }}
        answers = {{ by = "{by}" }}
        responses = {{ prompts = 6, max_new_tokens = 40 }}
        objective = {{ block_lengths = [6], blocks_per_row = 8 }}
        optimizer = {{ name = "adamw", lr = 0.01 }}
        schedule = {{ steps = 2 }}
        run = {{ output = "{path.parent / "run"}", batch_rows = 1, device = "{device}" }}
        [data]
        row_tokens = 128
        [[data.sources]]
        kind = "dataset"
        name = "{dataset}"
        columns = {{ prompt = "question", answer = "answer" }}
        weight = 1.0
    """
    path.write_text(text)
    return path


def test_the_command_reports_its_manifests(
    backbone: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`orthrus prepare` prints a line a set, or one JSON object; a backbone's recipe is refused."""
    recipe = str(written_recipe(tmp_path / "recipe.toml", backbone, dataset))
    assert main(["prepare", recipe]) == 0
    assert "6 answers" in capsys.readouterr().out
    assert main(["prepare", recipe, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["train"]["documents"] == 6
    backbones = Path(__file__).parents[2] / "recipes" / "nano/01-backbone-start.toml"
    assert main(["prepare", os.fspath(backbones)]) == 2
    assert "a recipe of answers is required" in capsys.readouterr().err


def test_the_command_has_its_device_before_the_backbone_goes_there(
    backbone: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate settles which of several GPUs "cuda" is: before that all processes would load onto the first."""
    order: list[str] = []

    def load(*_: Any) -> Any:
        order.append("backbone")
        raise ConfigError("enough")

    monkeypatch.setattr(ranks, "Ranks", lambda device: order.append("ranks"))
    monkeypatch.setattr(loading, "device_of", lambda device: order.append("device"))
    monkeypatch.setattr(start, "load_backbone", load)
    assert main(["prepare", str(written_recipe(tmp_path / "recipe.toml", backbone, dataset, by="backbone"))]) == 2
    assert order == ["ranks", "device", "backbone"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_the_command_refuses_a_device_that_is_not_there(
    backbone: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line that says so, and exit code 2."""
    recipe = written_recipe(tmp_path / "recipe.toml", backbone, dataset, by="backbone", device="cuda")
    assert main(["prepare", str(recipe)]) == 2
    assert "device 'cuda' cannot be used here" in capsys.readouterr().err


def test_token_ids_are_kept_as_int32(
    backbone: Path, dataset: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Rows are what training maps into memory."""
    rows = made(recipe_of(backbone, tmp_path / "run", dataset, answers={"by": "given"}), tokenizer).rows
    assert (rows.token_ids.dtype, rows.answer.dtype) == (np.int32, np.bool_)


def test_a_source_that_is_held_out_whole_is_refused(tmp_path: Path) -> None:
    (tmp_path / "few.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    source = JsonlSource(kind="jsonl", path=str(tmp_path / "few.jsonl"), weight=1.0, heldout=2)
    with pytest.raises(
        DataError, match=r"few: more documents than `heldout` \(2\) are required to train on, found no more"
    ):
        next(over_and_over(source, seed=0))
