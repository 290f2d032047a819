"""Prompts: checked when they are asked, read when their rows have joined, in slices where other rows decode.

Shapes: B rows, M drafts, V vocabulary.
"""

from collections.abc import Sequence
from typing import Final

import torch

from orthrus.decode.options import Options
from orthrus.decode.passes import Passes, Proposal
from orthrus.decode.rows import Rows
from orthrus.errors import CacheFull, PromptError
from orthrus.policy.policy import Policy

CHUNK: Final = 2048
"""Prompt positions per pass, where nothing else is asked for."""

SLICE: Final = {"cpu": 128, "cuda": 512}
"""Prompt positions per step while other rows decode, by kind of device, likewise."""


def limit_of(
    prompt_ids: Sequence[int], options: Options, *, vocabulary: int, context: int, capacity: int, scratch: int
) -> int:
    """Check a request against vocabulary, context and cache; return how many tokens it may write.

    Raises:
        PromptError: the prompt is empty, holds ids outside the vocabulary, or leaves no room in the context.
        CacheFull: prompt, text and the scratch of a step need more positions than a row's capacity.
    """
    if not prompt_ids:
        raise PromptError("the prompt must hold at least one token, found none: give it some text")
    if not (min(prompt_ids) >= 0 and max(prompt_ids) < vocabulary):
        raise PromptError(
            f"prompt tokens must be ids from 0 to {vocabulary - 1}, found {min(prompt_ids)} to {max(prompt_ids)}: "
            "encode it with the model's own tokenizer"
        )
    limit = min(options.max_new_tokens, context - len(prompt_ids))
    if limit < 1:
        raise PromptError(f"the model reads at most {context} tokens, the prompt has {len(prompt_ids)}: shorten it")
    needed = len(prompt_ids) + limit + scratch
    if needed > capacity:
        raise CacheFull(
            f"{len(prompt_ids)} prompt tokens, {limit} new ones and {scratch} of scratch need {needed} cache "
            f"positions, a row has {capacity}: ask for fewer tokens or a larger capacity"
        )
    return limit


class Reader:
    """Read the prompts of rows that have joined.

    Args:
        rows: the rows.
        passes: what reads.
        chunk: positions per pass at most; `CHUNK` unless given.
        most: positions per step at most while rows decode; `SLICE` unless given. Fixed shapes round it to whole passes.
        policy: says how many drafts the pass that ends a prompt should make for the first step; None for none.
    """

    def __init__(
        self, rows: Rows, passes: Passes, *, chunk: int | None, most: int | None, policy: Policy | None
    ) -> None:
        device = rows.cache.device.type
        self.rows = rows
        self.passes = passes
        self.chunk = chunk or CHUNK
        self.most = most or SLICE.get(device, SLICE["cpu"])
        self.policy = policy

    def step(self) -> list[tuple[slice, Proposal]]:
        """Read as much as rows that decode can wait for, or all of it; rows whose prompts are read begin to decode.

        Returns their places, and what the pass that has read their last tokens says: what follows, and the first
        drafts where they are wanted. It is the pass that ends a prompt. Where shapes are fixed, and behind a prompt
        whose keys were there, it is one like those of decoding.
        """
        if not self.rows.reading:
            return []
        drafts = 0 if self.policy is None else max(self.policy.prefill_drafts - 1, 0)
        geometry, begun = self.passes.geometry, []
        unit = 1 if geometry is None else geometry.chunks[-1]
        where, pieces = self.rows.next_to_read(self.most if self.rows.live else None, unit=unit)
        rows = self.rows.at(where)
        if any(pieces):
            whole = geometry is None and pieces == [self.rows.pending(row) for row in rows]
            anchors, more = ([row.anchor for row in rows], drafts) if whole else (None, 0)
            made = self.passes.prefill(where, pieces, chunk=self.chunk, anchors=anchors, drafts=more)
            if made is not None:
                begun.append((self.rows.begin(rows), made))
        if rest := [row for row in self.rows.reading if not self.rows.pending(row)]:
            where = self.rows.begin(rest)
            anchor_B = torch.tensor([row.anchor for row in rest], device=self.rows.cache.device)
            begun.append((where, self.passes.draft(where, anchor_B, drafts)))
        return begun
