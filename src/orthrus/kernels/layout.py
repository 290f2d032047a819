"""How a model's layers are laid out for decoding on CPUs: copies of weights, and attention by our own operator."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from orthrus.kernels import attention, compiled, merged, packed


def lay_out(model: PreTrainedModel, *, pack: bool | None = None, own: bool = True) -> None:
    """Let layers multiply by copies of their weights, and attention by our own operator.

    Args:
        model: a dual-view model in one dtype.
        pack: whether weights are copied; None where that is no slower and memory allows.
        own: whether attention takes our own operator, where it is compiled.
    """
    if pack or (pack is None and packed.pays(model)):
        packed.pack(model, merged.groups(model))
    if pack is None:
        packed.tune(model)
    if own and model.device.type == "cpu":
        attention.use_own(model)


@contextmanager
def laid_out(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block a model that is trained decodes as fast as one that was loaded; operators are compiled first.

    Afterwards its layers are as before: weights not copied, and attention by whatever it was.
    """
    if model.device.type == "cpu":
        compiled.prepare()
    owned = attention.uses_own(model, 1)
    try:
        lay_out(model)
        yield
    finally:
        packed.unpack(model)
        if not owned:
            attention.leave_own(model)
