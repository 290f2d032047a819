"""Answers drafted by a view that was trained before: the backbone's own words, in fewer passes."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from transformers import PreTrainedModel

from orthrus.checkpoints import files
from orthrus.checkpoints.load import locate
from orthrus.kernels.layout import laid_out
from orthrus.model import mask_row
from orthrus.model.attach import config_of
from orthrus.model.attachment import attachment_of
from orthrus.model.fingerprint import twin_tensors
from orthrus.model.markov import install, markov_of, untrained
from orthrus.train.start import in_one_dtype

PLAIN = "ar"
DRAFTED = "auto"  # drafts only where that is faster here


@contextmanager
def drafting(model: PreTrainedModel | None, view: str | None) -> Iterator[str]:
    """Yield the plan to write answers by; inside the block the model's twin holds `view`'s tensors, where one is named.

    Raises CheckpointError: `view` is no adapter, or one of another backbone.
    """
    if model is None or view is None:
        with nullcontext() if model is None else _as_loaded(model):
            yield PLAIN
        return
    config, correction, row = config_of(model), markov_of(model), mask_row.mask_row_of(model)
    tensors = {name: tensor.clone() for name, tensor in twin_tensors(model).items()}
    home = locate(view)
    attachment_of(model).config = lent = files.read_config(home)
    install(model, untrained(model, lent.markov_rank))
    mask_row.install(model, mask_row.untrained(model, lent.mask) if lent.trained_mask else None)
    try:
        files.load_adapter(model, home)
        with _as_loaded(model):
            yield DRAFTED
    finally:
        install(model, correction)
        mask_row.install(model, row)
        files.fill(model, tensors, where="the view to train")
        attachment_of(model).config = config


@contextmanager
def _as_loaded(model: PreTrainedModel) -> Iterator[None]:
    with in_one_dtype(model), laid_out(model):
        yield
