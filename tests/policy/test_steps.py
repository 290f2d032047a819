"""Plans by name, and the steps that each may take."""

import pytest

from orthrus.errors import ConfigError
from orthrus.policy.policy import Policy
from orthrus.policy.steps import Step, parse, slots

FIXED = {
    "ar": Step(),
    "full": Step(15),
    "fixed:4": Step(3),
    "tree:7": Step(15, nodes=7),
    "onepass:2": Step(15, stops=2),
    "onepass": Step(15, stops=16),
    "onepass:all": Step(15, stops=16),
    "onepass:20": Step(15, stops=16),
    "onepass:4:31": Step(15, nodes=31, stops=4),
    "onepass:all:31": Step(15, nodes=31, stops=32),
    "onepass:all:5": Step(15, nodes=5, stops=6),
    "lookup": Step(15, lookup=True),
    "lookup:3": Step(3, lookup=True),
}


@pytest.mark.parametrize(("name", "step"), FIXED.items())
def test_a_fixed_plan_is_one_step(name: str, step: Step) -> None:
    """Whatever kinds are left out of a choice, there is none to make."""
    assert parse(name).steps(16) == (step,)
    assert parse(name).scratch(16) == step.scratch
    assert parse(name).without("onepass", "tree") == parse(name)


OTHERS = ["", "fixed", "fixed:1", "fixed:x", "tree:0", "onepass:0", "onepass:2:0", "onepass:2:", "onepass:x:3"]
OTHERS += ["lookup:0", "fast", "ar:2", "auto:", "auto:plain", "auto:onepass"]


@pytest.mark.parametrize("text", OTHERS)
def test_other_names_are_refused(text: str) -> None:
    """The message lists the plans there are."""
    with pytest.raises(ConfigError, match="a plan is 'auto'"):
        parse(text)


def test_blocks_beyond_the_trained_length_are_refused() -> None:
    """A view trained for 16 is not asked for 17."""
    with pytest.raises(ConfigError, match="trained for at most 16"):
        Policy(parse("fixed:17"), block=16)


def test_auto_chooses_among_the_kinds_it_is_told_to() -> None:
    """Plain steps and chains always; trees and copies unless told otherwise."""
    kinds = {name: {step.kind for step in parse(name).steps(16)} for name in ("auto", "auto:chain")}
    assert kinds["auto"] == {"plain", "chain", "tree", "lookup"}
    assert kinds["auto:chain"] == {"plain", "chain"}
    assert parse("auto:tree+lookup").steps(16) == parse("auto").steps(16)
    assert parse("auto").without("tree").steps(16) == parse("auto:lookup").steps(16)


@pytest.mark.parametrize("block", [2, 4, 6, 8, 16, 32, 64])
def test_steps_of_auto_fit_the_block_and_its_scratch(block: int) -> None:
    """No step drafts more than the view was trained for, and the longest does so much; copies need no view, and reach
    15 tokens. Trees fit into two blocks and a first token.
    """
    steps = parse("auto").steps(block)
    assert {step.drafts for step in steps if step.kind == "chain"} >= {1, block - 1}
    assert max(step.drafts for step in steps if not step.lookup) == block - 1
    assert max(step.drafts for step in steps if step.lookup) == slots(block) == max(block - 1, 15)
    assert max(step.scratch for step in steps) == parse("auto").scratch(block) == max(2 * block + 1, 16)
    assert len(set(steps)) == len(steps)
