"""In how many parts a step is computed: as few as fit in memory, when a recipe asks for that."""

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from orthrus.errors import ConfigError
from orthrus.train.step import Training


def parts_of_step(training: Training, *, step: int, at_least: int = 1) -> int:
    """Return `run.grad_accumulation`, or, where that is "auto", the first number of equal parts that fit everywhere.

    Each is tried by computing the gradients of `step` and throwing them away. `at_least`: what a run that is taken up
    again was computed in. Raises ConfigError: not even the smallest parts fit, or rows cannot be shared by the
    processes.
    """
    recipe, ranks = training.recipe, training.ranks
    run = recipe.run
    if run.grad_accumulation != "auto":
        return run.grad_accumulation
    choices = [parts for parts in equal_parts(run.batch_rows, ranks.count) if parts >= at_least]
    for parts in choices:
        if not ranks.any(not _fits(training, step=step, parts=parts)):
            return parts
    tried = ", ".join(map(str, choices))
    remedies = ["data.row_tokens"]
    for section, key in (("objective", "blocks_per_row"), ("model", "gradient_checkpointing")):
        if hasattr(getattr(recipe, section, None), key):
            remedies.append(f"{section}.{key}")
    raise ConfigError(
        f"run.grad_accumulation = 'auto': a step that fits in memory is required, but neither {tried} "
        f"part(s) of {run.batch_rows} rows do on {ranks.count} process(es): change {', '.join(remedies)}, or take a "
        "device with more memory"
    )


def equal_parts(rows: int, processes: int) -> list[int]:
    """Return the numbers of equal parts to try, in ascending order, down to a row a process.

    Raises ConfigError: the processes cannot share the rows equally.
    """
    if rows % processes:
        raise ConfigError(f"run.batch_rows must be a multiple of the processes ({processes}), found {rows}")
    return [parts for parts in range(1, rows + 1) if rows % (parts * processes) == 0]


def _fits(training: Training, *, step: int, parts: int) -> bool:
    """Whether this process can compute the gradients of a step beside what its optimizers keep from the first on."""
    kept = () if any(optimizer.state for optimizer in training.optimizers) else training.trainable.values()
    room = []
    try:
        room = [torch.empty_like(parameter) for parameter in kept for _ in range(2)]
        training.accumulate(step, parts=parts)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        fits = False
    else:
        fits = True
    training.task.model.zero_grad(set_to_none=True)
    room.clear()
    clear_device_cache(garbage_collection=True)  # behind the handler: the error holds on to the pass that failed
    return fits
