"""What planners learned outlives a process, and nothing else comes of it: no text, no error, no harm."""

import gc
import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from orthrus.decode.costs import Costs
from orthrus.decode.engine import Engine
from orthrus.decode.experience import Experience, begin_anew, experience_of
from orthrus.decode.options import Options
from orthrus.decode.planner import Planner
from orthrus.model.attach import attach, detach
from orthrus.model.config import OrthrusConfig
from orthrus.policy import steps
from orthrus.policy.steps import Step, parse
from tests import reference
from tests.decode.drive import decode, dual
from tests.decode.simulated import BLOCK, fixed, geometric, linear, simulate
from tests.families import tiny

PROMPTS = [[5, 6, 7, 8, 5, 6, 7, 8, 5], [5, 6, 7, 8, 9, 10, 11], [60, 61]]
OPTIONS = Options(max_new_tokens=40)


def learned() -> Experience:
    planner = Planner(parse("auto"), block=BLOCK)
    simulate(geometric(0.8), price=linear(1.4), tokens=3000, planner=planner)
    return planner.known


def next_process(known: Experience) -> Planner:
    """A planner that has read what another process wrote."""
    record = json.loads(json.dumps(known.to_record()))
    return Planner(parse("auto"), block=BLOCK, experience=Experience.from_record(record, block=BLOCK))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    gc.collect()  # what models of other tests leave behind is not for this folder
    monkeypatch.setenv("ORTHRUS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(model: PreTrainedModel) -> list[list[int]]:
    """Decode some texts under `auto`, for long enough to have learned something."""
    engine = Engine(model, rows=1, capacity=160, plan=steps.parse("auto"), clock=Ticking())
    return [row.token_ids for row in decode(engine, PROMPTS * 2, OPTIONS)]


class Ticking:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


# ---------------------------------------------------------------- what is kept


def test_what_was_learned_is_read_as_it_was_written() -> None:
    """Costs of every step, what drafts are worth, and what trees add: the same figures, but for four decimals."""
    known = learned()
    again = next_process(known).known
    steps = parse("auto").steps(BLOCK)
    torch.testing.assert_close(
        again.costs.over(1).estimates.table(steps),
        known.costs.over(1).estimates.table(steps),
        rtol=1e-4,
        atol=0,
        equal_nan=True,
    )
    torch.testing.assert_close(again.worth.counts, known.worth.counts, atol=1e-4, rtol=0)
    torch.testing.assert_close(again.worth.hits, known.worth.hits, atol=1e-4, rtol=0)
    torch.testing.assert_close(again.usual_met, known.usual_met, atol=1e-4, rtol=0)
    for step, rescue in known.rescues.items():
        assert again.rescues[step].drafts == pytest.approx(rescue.drafts, abs=1e-4)
    assert (again.turn, again.last, again.longest) == (known.turn, known.last, known.longest)


@pytest.mark.parametrize("wide", [1.2, 1.4, 1.75])
def test_a_second_process_does_not_learn_again(wide: float) -> None:
    """Ten times 300 tokens of the kind known take at most 4 % more than the best step of each, and less than anew."""
    price, planner = linear(wide), Planner(parse("auto"), block=BLOCK)
    simulate(geometric(0.95), price=price, tokens=3000, planner=planner)
    best, anew, again = 0.0, 0.0, 0.0
    for seed in range(1, 11):
        accept = geometric(0.95, seed=seed)
        best += min(fixed(Step(m), accept, price, 300) for m in range(BLOCK))
        anew += simulate(accept, price=price, tokens=300)[0]
        again += simulate(accept, price=price, tokens=300, planner=next_process(planner.known))[0]
    assert again <= 1.04 * best
    assert again < anew


@pytest.mark.parametrize("pace", [0.3, 3.0])
@pytest.mark.parametrize("rate", [0.3, 0.8])
def test_a_machine_of_another_pace_is_soon_known(rate: float, pace: float) -> None:
    """Where passes take three times as long as they did, or a third, texts take that and at most 3 % more."""
    price, planner = linear(1.4), Planner(parse("auto"), block=BLOCK)
    simulate(geometric(rate), price=price, tokens=3000, planner=planner)

    def other(step: Step, drew: bool = True) -> float:
        return pace * price(step, drew)

    same, paced = 0.0, 0.0
    for seed in range(1, 9):
        accept = geometric(rate, seed=seed)
        same += simulate(accept, price=price, tokens=300, planner=next_process(planner.known))[0]
        paced += simulate(accept, price=other, tokens=300, planner=next_process(planner.known))[0]
    assert paced <= 1.03 * pace * same


@pytest.mark.parametrize("pace", [0.3, 3.0])
def test_a_machine_of_another_pace_is_known_for_good(pace: float) -> None:
    """Long texts of one kind, in which few steps are taken, then of another: at most 3 % more than at the old pace."""
    price, planner = linear(1.4), Planner(parse("auto"), block=BLOCK)
    simulate(geometric(0.9), price=price, tokens=3000, planner=planner)

    def taken(pace: float, seed: int) -> float:
        again = next_process(planner.known)
        for rate, tokens in ((0.9, 4000), (0.6, 1000)):
            accept = geometric(rate, seed=seed)
            seconds = simulate(accept, price=lambda *step: pace * price(*step), tokens=tokens, planner=again)[0]
        return seconds / pace

    assert sum(taken(pace, seed) for seed in range(4)) <= 1.03 * sum(taken(1.0, seed) for seed in range(4))


def test_what_was_measured_elsewhere_is_held_to_the_pace_of_what_is_measured_here() -> None:
    """One step at twice its time: all others count as twice theirs, what is kept next included."""
    before = Costs()
    for step, seconds in ((Step(), 1.0), (Step(15), 3.0), (Step(7), 2.0)):
        for _ in range(3):
            before.observe(step, 1, seconds)
    costs = Costs.from_record(before.to_record())
    every = (Step(), Step(7), Step(15))
    assert costs.over(1).estimates.table(every)[0] == pytest.approx([1.0, 2.0, 3.0])
    costs.observe(Step(15), 1, 99.0)  # its first run here
    assert costs.over(1).estimates.table(every)[0] == pytest.approx([1.0, 2.0, 3.0])
    costs.observe(Step(15), 1, 6.0)
    assert costs.over(1).pace * costs.over(1).estimates.table(every)[0] == pytest.approx([2.0, 4.0, 6.0], rel=0.03)
    again = Costs.from_record(costs.to_record())
    assert again.over(1).estimates.table(every)[0] == pytest.approx([2.0, 4.0, 6.0], rel=0.03)


@pytest.mark.parametrize("block", [4, 66, 129])
def test_another_view_of_a_model_begins_anew(block: int) -> None:
    """What stood for blocks of 8 is no step of theirs; blocks may be longer than any step on the ladder, too."""
    model = dual(num_hidden_layers=1, max_position_embeddings=512)
    write(model)
    known = experience_of(model, "distribution", steps.parse("auto"))
    assert known.turn > 0
    attach(detach(model), OrthrusConfig(block_size=block), attn_implementation="orthrus")
    assert experience_of(model, "distribution", steps.parse("auto")).turn == 0
    engine = Engine(model, rows=1, capacity=400, plan=steps.parse("auto"), clock=Ticking())
    rows = decode(engine, PROMPTS * 2, OPTIONS)
    backbone = tiny("qwen3", num_hidden_layers=1, max_position_embeddings=512)
    assert [row.token_ids for row in rows] == [reference.greedy_text(backbone, p, 40) for p in PROMPTS * 2]


# ---------------------------------------------------------------- files


def test_a_second_process_begins_with_what_the_first_learned(folder: Path) -> None:
    """The file is written when the model goes; texts are the plain loop's before and after."""
    expected = [reference.greedy_text(tiny("qwen3", num_hidden_layers=1), p, 40) for p in PROMPTS * 2]
    model = dual(num_hidden_layers=1)
    assert write(model) == expected
    turns = experience_of(model, "distribution", steps.parse("auto")).turn
    assert turns > 0
    assert not folder.exists()
    del model
    gc.collect()
    (file,) = (folder / "experience").iterdir()
    assert json.loads(file.read_text())["record"]["turn"] == turns
    again = dual(num_hidden_layers=1)
    assert experience_of(again, "distribution", steps.parse("auto")).turn == turns
    assert experience_of(again, "token", steps.parse("auto")).turn == 0
    assert write(again) == expected


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"format": 3', '"format": 2'),
        lambda text: text.replace('"counts": [', '"counts": [0, '),
        lambda text: text.replace('"turn": ', '"turn": "many", "was": '),
        lambda text: text.replace('"costs": [[', '"costs": [[1], ['),
        lambda text: text.replace('"costs": [[', '"costs": [[1, 0, 0, 0, false, 5, NaN], ['),
    ],
)
def test_a_file_that_is_no_good_costs_a_beginning_and_nothing_else(folder: Path, damage: object) -> None:
    model = dual(num_hidden_layers=1)
    write(model)
    del model
    gc.collect()
    (file,) = (folder / "experience").iterdir()
    text = file.read_text()
    assert callable(damage)
    file.write_text(damage(text))
    assert file.read_text() != text
    again = dual(num_hidden_layers=1)
    assert experience_of(again, "distribution", steps.parse("auto")).turn == 0


def test_nothing_is_kept_where_nothing_is_to_be(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that begins anew, of a few steps only, and with no folder named."""
    for forgetful in (True, False):
        model = dual(num_hidden_layers=1)
        if forgetful:
            begin_anew(model)
            write(model)
        else:
            engine = Engine(model, rows=1, capacity=160, plan=steps.parse("auto"))
            decode(engine, [[5, 6, 7]], Options(max_new_tokens=4))
            del engine
        del model
        gc.collect()
        assert not folder.exists()
    monkeypatch.setenv("ORTHRUS_CACHE", "")
    model = dual(num_hidden_layers=1)
    write(model)
    assert experience_of(model, "distribution", steps.parse("auto")).turn > 0
