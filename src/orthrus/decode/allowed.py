"""Who drafts for an engine, and which steps of a plan it may take: by who drafts, and by what its exactness allows."""

import warnings
from dataclasses import replace

from transformers import PreTrainedModel

from orthrus.decode.drafters import VIEW, Drafter, ViewDrafter
from orthrus.decode.exact import Finding, can_fuse
from orthrus.errors import ConfigError
from orthrus.model.attachment import attachment_of, config_of
from orthrus.model.markov import markov_of
from orthrus.policy.steps import Plan, parse


def drafter_for(model: PreTrainedModel, plan: Plan, drafter: Drafter | None = None) -> Drafter:
    """Return who drafts: the one given, the one that the model was loaded with, or its own view.

    Under a plan without drafts it is the view, which reads no hidden states.
    """
    if plan.kinds is None and (plan.drafts == 0 or plan.lookup):
        return ViewDrafter(markov_of(model))
    lent: Drafter | None = attachment_of(model).drafter
    return drafter or lent or ViewDrafter(markov_of(model))


def block_of(model: PreTrainedModel, drafter: Drafter) -> int:
    """Return the longest block of a drafter: the anchor and all that it can propose behind it."""
    return (drafter.proposals or config_of(model).proposals) + 1


def drafted_by(plan: Plan, drafter: Drafter, *, block: int) -> Plan:
    """Return the plan, which a drafter other than the view can follow if no pass is to verify and draft.

    Raises:
        ConfigError: such a pass is what it asks for.
    """
    if drafter.name != VIEW and any(step.stops for step in plan.steps(block)):
        raise ConfigError(
            f"plan {plan.name!r} drafts in the pass that verifies, which only the view does, found drafter "
            f"{drafter.name!r}: take 'full', 'fixed:K' or 'tree:N'"
        )
    return plan


def bit_for_bit(plan: Plan, model: PreTrainedModel, finding: Finding, *, block: int, rows: int) -> Plan:
    """Return a plan with those steps alone that keep texts the same bit for bit; warns where none drafts.

    A tree's path is verified once more, and each shape of a fused pass has to be probed first: both take longer than
    `auto` could gain by them.
    """
    if not finding.holds:
        reasons = "; ".join(finding.broken)
        warnings.warn(f"exact='token' cannot verify drafts here ({reasons}): decoding plainly", stacklevel=3)
        return parse("ar")
    plan = replace(plan.without("tree"), copied=0)  # no pass may be wider than those that were probed
    (step, *others) = plan.steps(block)
    if others or step.kind != "onepass":
        return plan
    chain = step._replace(nodes=0, stops=min(step.stops, step.drafts + 1))
    fuses = can_fuse(model, finding, rows=rows, drafts=chain.drafts, stops=chain.stops)
    return replace(plan, drafts=step.drafts, nodes=0, stops=chain.stops if fuses else 0)
