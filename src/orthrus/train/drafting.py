"""Answers drafted by a view that was trained before: the backbone's own words, in fewer passes.

Knows how a model's twin is lent to another view and gets its own tensors back; knows neither prompts nor files of
answers.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from orthrus.model import checkpoint
from orthrus.model.attach import config_of
from orthrus.model.load import locate
from orthrus.model.markov import install, markov_of, untrained

PLAIN = "ar"
DRAFTED = "auto"  # drafts only where that is faster here


@contextmanager
def drafting(model: PreTrainedModel | None, view: str | None) -> Iterator[str]:
    """Yield the plan to write answers by; inside the block the model's twin holds `view`'s tensors, where one is named.

    Raises:
        CheckpointError: `view` is no adapter, or one of another backbone.
    """
    if model is None or view is None:
        yield PLAIN
        return
    config, correction = config_of(model), markov_of(model)
    own = {name: tensor.clone() for name, tensor in checkpoint.twin_tensors(model).items()}
    home = locate(view)
    model.orthrus_config = lent = checkpoint.read_config(home)
    install(model, untrained(model, lent.markov_rank))
    try:
        checkpoint.load_adapter(model, home)
        yield DRAFTED
    finally:
        install(model, correction)
        checkpoint.fill(model, own, where="the view to train")
        model.orthrus_config = config
