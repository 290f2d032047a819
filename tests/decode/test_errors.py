"""A row that fails ends with an error of its own; its neighbours' texts are the plain loop's to the last token."""

import math

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import orthrus
from orthrus.decode.accept import NONE, greedy
from orthrus.decode.engine import Engine
from orthrus.decode.options import Options, Sampling
from orthrus.decode.rows import Row
from orthrus.errors import DecodingError
from orthrus.policy import steps
from tests import reference
from tests.decode.drive import dual
from tests.families import VOCAB, tiny

TEXTS = {tuple(p): reference.greedy_text(tiny("qwen3"), p, 9) for p in ([5, 6, 7], [30, 31, 32, 33, 34], [8, 9])}
SPOILED = next(token for token in range(80, VOCAB) if all(token not in text for text in TEXTS.values()))
PROMPTS = [[5, 6, 7], [5, 6, SPOILED], [30, 31, 32, 33, 34]]
OPTIONS = Options(max_new_tokens=9)
PLANS = ["ar", "full", "fixed:3", "tree:6", "onepass:2", "onepass:2:6", "lookup", "auto"]


def broken(value: float) -> PreTrainedModel:
    """A model one of whose tokens, which none of the good texts writes, spoils every text that holds it."""
    model = dual()
    with torch.no_grad():
        model.get_input_embeddings().weight[SPOILED] = value
    return model


def run(engine: Engine, *prompts: list[int], options: Options = OPTIONS) -> list[Row]:
    ids = [engine.add(prompt, options) for prompt in prompts]
    done = {progress.row.id: progress.row for progress in engine.run()}
    return [done[id] for id in ids]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_end_their_row_alone(value: float, plan: str) -> None:
    """Its neighbours go on, and so does who comes after it: in its place, and with its prompt's start."""
    engine = Engine(broken(value), rows=3, capacity=200, plan=steps.parse(plan))
    first, second, third = run(engine, *PROMPTS)
    assert (second.token_ids, second.finish_reason) == ([], "error")
    assert isinstance(second.error, DecodingError)
    assert [row.token_ids for row in (first, third)] == [TEXTS[5, 6, 7], TEXTS[30, 31, 32, 33, 34]]
    again = run(engine, [8, 9], PROMPTS[0], [8, 9])
    assert [row.token_ids for row in again] == [TEXTS[8, 9], TEXTS[5, 6, 7], TEXTS[8, 9]]
    assert {row.error for row in again} == {None}


@pytest.mark.parametrize("plan", ["ar", "full", "tree:6"])
def test_sampled_rows_fail_alone_as_well(plan: str) -> None:
    """Greedy neighbours are unharmed, although they begin as the one does that fails."""
    engine = Engine(broken(math.nan), rows=3, capacity=200, plan=steps.parse(plan))
    sampled = Options(max_new_tokens=9, sampling=Sampling(do_sample=True, temperature=0.7, top_p=0.9))
    ids = [engine.add(PROMPTS[1], sampled), engine.add(PROMPTS[0], OPTIONS), engine.add(PROMPTS[0], sampled)]
    rows = {progress.row.id: progress.row for progress in engine.run()}
    assert [rows[id].finish_reason for id in ids] == ["error", "length", "length"]
    assert rows[ids[1]].token_ids == TEXTS[5, 6, 7]


def test_a_text_that_spoils_on_the_way_keeps_what_it_had() -> None:
    """The token that spoils it is its last one: the logits after it are no numbers.

    Where that token is a draft its keys spoil the whole pass, and the text ends with what the passes before gave.
    """
    text = TEXTS[5, 6, 7]
    model = dual()
    spoiling = next(token for token in text[3:] if token not in (5, 6, 7, *text[:3]))
    end = text.index(spoiling) + 1
    with torch.no_grad():
        model.get_input_embeddings().weight[spoiling] = math.nan
    for plan in PLANS:
        (row,) = run(Engine(model, rows=1, capacity=200, plan=steps.parse(plan)), [5, 6, 7])
        assert (row.token_ids, row.finish_reason) == (text[: len(row.token_ids)], "error"), plan
        assert row.stats.emitted == len(row.token_ids) == end or (plan != "ar" and 0 < len(row.token_ids) < end)


def test_the_tokens_before_a_broken_slot_are_kept() -> None:
    """As the acceptance rules decided them; broken slots past the bonus do not matter."""
    nan, inf = math.nan, math.inf
    scores = torch.nn.functional.one_hot(torch.tensor([[0, 1, 2, 3]] * 5), 5).float()
    scores[1, 1, 4] = nan
    scores[2, 0] = -inf
    scores[3, 3, 3] = inf
    scores[4, 3, 0] = nan
    drafts = torch.tensor([[0, 1, 2]] * 4 + [[0, 1, 4]])
    verdict = greedy(drafts, scores)
    assert verdict.accepted_B.tolist() == [3, 1, 0, 3, 2]
    bonus = verdict.tokens_BM1.gather(1, verdict.accepted_B[:, None])[:, 0]
    assert bonus.tolist() == [3, NONE, NONE, NONE, 2]


@pytest.mark.parametrize("plan", ["ar", "full", "auto"])
def test_a_stopper_that_raises_ends_its_row_alone(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it raised is the row's error; tokens of the cycle that it could not judge are not kept."""
    engine = Engine(dual(), rows=3, capacity=200, plan=steps.parse(plan))
    ids = [engine.add(prompt, OPTIONS) for prompt in (PROMPTS[0], [8, 9], PROMPTS[2])]
    calls = list[int]()

    def cut(tokens: list[int]) -> None:
        calls.append(len(tokens))
        raise KeyError("a callback's own")

    monkeypatch.setattr(engine.waiting[1].stopper, "cut", cut)
    rows = {progress.row.id: progress.row for progress in engine.run()}
    assert len(calls) == 1
    assert isinstance(rows[ids[1]].error, KeyError)
    assert (rows[ids[1]].token_ids, rows[ids[1]].finish_reason, rows[ids[1]].stats.emitted) == ([], "error", 0)
    assert [rows[id].token_ids for id in (ids[0], ids[2])] == [TEXTS[5, 6, 7], TEXTS[30, 31, 32, 33, 34]]


def test_callers_learn_of_it(characters: PreTrainedTokenizerBase) -> None:
    """`generate` returns the good texts beside it; `stream` and `finish` raise, when the others have ended."""
    model = broken(math.nan)
    bad, good = (characters.decode(ids) for ids in ([SPOILED], [5, 6, 7]))
    done = orthrus.generate(model, characters, [bad, good], max_new_tokens=9)
    assert [(c.finish_reason, type(c.error)) for c in done] == [("error", DecodingError), ("length", type(None))]
    assert done[1].token_ids == TEXTS[5, 6, 7]
    assert done[0].to_dict()["error"].startswith("finite logits are required")
    assert "error" not in done[1].to_dict()
    with pytest.raises(DecodingError):
        list(orthrus.stream(model, characters, bad, max_new_tokens=9))
    engine = Engine(model, rows=2, capacity=64, plan=steps.parse("full"))
    with pytest.raises(DecodingError):
        engine.finish([[SPOILED], [5, 6, 7]], OPTIONS)
    assert not engine.busy
