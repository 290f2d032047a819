"""What engines of one model learn together about their steps; it lives as long as the model does."""

from transformers import PreTrainedModel

from orthrus.decode.allowed import block_of
from orthrus.decode.drafters import Drafter
from orthrus.model.attachment import attachment_of, config_of
from orthrus.model.fingerprint import key_of
from orthrus.policy.policy import Experience
from orthrus.policy.steps import Plan


def experience_of(model: PreTrainedModel, exact: str, plan: Plan, drafter: Drafter) -> Experience:
    """Return what is known of this model's steps on its device, by the same drafter and plans of the same kinds."""
    view, block = config_of(model), block_of(model, drafter)
    memo = attachment_of(model).memo("policy")
    experience: Experience = memo.setdefault(
        (view, exact, plan.kinds, drafter.name, block, *key_of(model)), Experience.of(block)
    )
    return experience


def begin_anew(model: PreTrainedModel) -> None:
    """Forget what steps of a model took and gave, and let no finding about it be read from or written to disk."""
    attachment_of(model).memo("policy").clear()
    attachment_of(model).remembers = False
