"""The rows of a cache: one object for all that belongs to a completion in flight, and where each one stands.

Rows that decode stand at the front, so that a cycle runs over exactly them; those whose prompts are still being read
stand behind, and free ones, which keep the keys of ended texts, at the end. Knows the cache; runs no pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from orthrus.decode.options import Options
from orthrus.decode.output import FinishReason, Stats
from orthrus.decode.prefixes import Prefixes, resume_lengths
from orthrus.decode.processing import Kept, Processing
from orthrus.decode.stop import Stopper
from orthrus.errors import DecodingError
from orthrus.model.cache import ScratchCache
from orthrus.policy.acceptance import RowState
from orthrus.policy.lookup import Lookup


class Ready(NamedTuple):
    """Logits `[M, V]` of drafts that an earlier pass has made for a row, and whether it did not know the anchor."""

    logits_MV: Tensor
    blind: bool

    @property
    def tokens(self) -> int:
        """How many tokens a step is asked for to take all of them; where it is known, the anchor is the first."""
        return len(self.logits_MV) + (not self.blind)

    def cut(self, tokens: int) -> Tensor:
        """Return the drafts for a step of so many tokens."""
        return self.logits_MV[: tokens - (not self.blind)]


@dataclass(kw_only=True, slots=True, eq=False)
class Row:
    """One completion: its tokens so far, what it was asked for, what it cost, and what drafting needs to know of it.

    A row that fails ends with the reason "error" and the exception as its `error`; the others go on.

    Attributes:
        id: its number among the engine's completions.
        prompt_ids: the prompt.
        options: what was asked for.
        stopper: says where the text ends.
        stream: its noise (`decode.noise`).
        state: what the policy goes by.
        token_ids: the text so far.
        stats: what it cost.
        lookup: its own text, as drafts are copied from it.
        ready: drafts that an earlier pass has made for it.
        drafting: what the drafter keeps of it.
        seen: the tokens that it contains, each once, where these are penalised.
        processing: its own processing of logits, where the options ask for one.
        finish_reason: why it ended; None while it goes on.
        error: what went wrong.
        cached: tokens of the prompt whose keys were there when it joined.
        behind: the row that begins with most of this prompt, while this one waits for its keys.
        shared: after how many tokens of its prompt others go another way.
    """

    id: int
    prompt_ids: list[int]
    options: Options
    stopper: Stopper
    stream: int
    state: RowState
    token_ids: list[int] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    lookup: Lookup = field(default_factory=Lookup)
    ready: Ready | None = None
    drafting: Any = None
    seen: dict[int, None] = field(default_factory=dict)
    processing: Processing | None = None
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    cached: int = 0
    behind: "Row | None" = None
    shared: set[int] = field(default_factory=set)

    @property
    def anchor(self) -> int:
        """The last token of the text, whose keys the next pass writes."""
        return self.token_ids[-1] if self.token_ids else self.prompt_ids[-1]

    @property
    def penalised(self) -> bool:
        """True where tokens that the row contains already are penalised."""
        return self.options.sampling.repetition_penalty != 1.0

    def fail(self, error: Exception) -> None:
        """End this completion with an error; the first one counts."""
        self.finish_reason, self.error = "error", self.error or error

    def keep(self, tokens: list[int], *, broken: bool) -> tuple[list[int], Kept | None]:
        """Add tokens as far as the text goes; returns these, and their logits where the options ask for them.

        What goes wrong ends the row: a stopper that raises, or that it is `broken` after these tokens.
        """
        kept: list[int] = []
        try:
            kept, self.finish_reason = self.stopper.cut(tokens)
        except Exception as error:
            self.fail(error)
        logits = None if self.processing is None else self.processing.take(kept)
        self.token_ids += kept
        self.seen.update(dict.fromkeys(kept if self.penalised else ()))
        if broken and self.finish_reason is None:
            raised = None if self.processing is None else self.processing.error_after(tokens)
            self.fail(
                raised
                or DecodingError(
                    "finite logits are required to choose a token by, found NaN, infinity or none possible after "
                    f"{len(self.token_ids)} tokens: look at the model's weights and at what changes its logits"
                )
            )
        return kept, logits

    def observe(self, *, copies: bool) -> None:
        """Bring what the policy goes by up to date; `copies` says whether it needs the text's matches."""
        self.state.ready, self.state.blind = (self.ready.tokens, self.ready.blind) if self.ready else (0, False)
        if copies:
            self.lookup.extend(self.prompt_ids[len(self.lookup) :])
            self.lookup.extend(self.token_ids[len(self.lookup) - len(self.prompt_ids) :])
            self.state.match = self.lookup.match

    def text(self) -> list[int]:
        """Return the prompt and the tokens so far."""
        return self.prompt_ids + self.token_ids

    def part(self, start: int, stop: int) -> list[int]:
        """Return tokens `start … stop-1` of the prompt and the tokens so far."""
        prompt = len(self.prompt_ids)
        return self.prompt_ids[start:stop] + self.token_ids[max(start - prompt, 0) : max(stop - prompt, 0)]


class Rows:
    """Place completions in a cache, and find the keys that they can begin with.

    Args:
        cache: the cache; whatever places change, moves with its keys.
        reuse: whether a prompt may begin with keys that were written for another text.
    """

    def __init__(self, cache: ScratchCache, *, reuse: bool) -> None:
        self.cache = cache
        self._reuse = reuse
        self._taken: list[Row] = []
        self._decoding = 0
        self._prefixes = Prefixes(cache.rows, cache.capacity)
        self._joined = [-1] * cache.rows  # the last completion of each place

    @property
    def live(self) -> list[Row]:
        """Those that decode, in the order of their places from 0 on."""
        return self._taken[: self._decoding]

    @property
    def reading(self) -> list[Row]:
        """Those whose prompts are being read, in the order of the places behind."""
        return self._taken[self._decoding :]

    @property
    def free(self) -> int:
        """Places for more."""
        return self.cache.rows - len(self._taken)

    def at(self, where: slice) -> list[Row]:
        """Return the rows of some places."""
        return self._taken[where]

    def pending(self, row: Row) -> list[int]:
        """Return the tokens of a prompt that have no keys yet, all but the last: that one is the first anchor."""
        return row.prompt_ids[self.cache.lengths[self._taken.index(row)] : -1]

    def join(self, row: Row) -> int | None:
        """Give a completion a place behind the others, with the keys that any row has of its prompt's start.

        Returns how many tokens these are; None where another row, which has no token yet, will have the keys of more
        than half of what this one would read. It is to be offered again in the next step then.

        Keys of another row are copied once, here; a shared start (a system prompt, say) is so read once and not for
        every request. Where layers have a recurrent state, that must be there too (`RecurrentStates.resumable`). It
        replaces an ended text that it goes on from, or else the one that joined longest ago.
        """
        if row.behind is not None and not (row.behind.token_ids or row.behind.finish_reason):
            return None
        index, wanted = len(self._taken), row.prompt_ids[:-1]
        for other in range(index):
            self._note(other)
        source, common = index, 0
        if self._reuse:
            source, common = self._prefixes.longest(wanted, prefer=index, resumable=self._resumable)
            row.shared = {self._prefixes.longest(wanted, prefer=index)[1]}
            row.behind = self._ahead_of(wanted, common)
            if row.behind is not None:
                return None
        goes_on = source >= index and 0 < common == self._prefixes.lengths[source]
        given_up = source if goes_on else min(range(index, self.cache.rows), key=self._joined.__getitem__)
        self._swap(index, given_up)
        source = {index: given_up, given_up: index}.get(source, source)
        if common and source != index:
            self.cache.copy_start(source, index, common)
        self._prefixes.cut(index, 0)
        self._prefixes.extend(index, wanted)  # what is still to be read as well, so that others find it
        self.cache.set_length(index, common)
        self.cache.states.ask(index, resume_lengths(len(wanted), row.shared) if self._reuse else ())
        self._joined[index] = row.id
        self._taken.append(row)
        return common

    def _begins(self, index: int) -> bool:
        """Tell whether a place's text has no token yet, which shows that its keys are numbers."""
        return index < len(self._taken) and not self._taken[index].token_ids

    def _ahead_of(self, wanted: list[int], cached: int) -> Row | None:
        """Return the row that a text should wait for, and have that one keep recurrent states where they part."""
        index, common = self._prefixes.longest(
            wanted, prefer=0, resumable=lambda index, common: common if self._begins(index) else 0
        )
        if 2 * (common - cached) <= len(wanted) - cached:
            return None
        row = self._taken[index]
        if common < (end := len(row.prompt_ids) - 1):
            row.shared.add(common)
            self.cache.states.ask(index, resume_lengths(end, row.shared))
        return row

    def _resumable(self, index: int, common: int) -> int:
        return 0 if self._begins(index) else self.cache.states.resumable(index, common)

    def begin(self, rows: Sequence[Row]) -> slice:
        """Let rows whose prompts are read decode, in the order of their places; returns the new ones."""
        start = self._decoding
        for row in rows:
            self._swap(self._taken.index(row), self._decoding)
            self._decoding += 1
        return slice(start, self._decoding)

    def remove(self, row: Row) -> None:
        """Free a row's place and keep its keys there, but for those of one that failed."""
        index = self._taken.index(row)
        if row.error is None:
            if self.cache.lengths[index] > (length := len(row.text())):  # the text ends inside a block
                self.cache.set_length(index, length)
            self._prefixes.cut(index, self.cache.lengths[index])  # a prompt that was not read to its end
            self._note(index)
        else:  # nobody may go on from keys that are no numbers, or meet them behind a mask
            self._prefixes.cut(index, 0)
            self.cache.wipe(index)
        if index < self._decoding:
            self._decoding -= 1
            self._swap(index, self._decoding)
            index = self._decoding
        self._swap(index, len(self._taken) - 1)
        self._taken.pop()

    def next_to_read(self, most: int | None, *, unit: int = 1) -> tuple[slice, list[list[int]]]:
        """Choose neighbours to read next, and how much of their prompts.

        Args:
            most: positions at most: of the one that joined first, and of whole prompts beside it that share its passes,
                all as long as the longest; None for all of all rows.
            unit: what is read of a longer prompt is a multiple of this, the unit itself at least.
        """
        first, last = self._decoding, len(self._taken)
        unread = [index for index in range(first, last) if self.pending(self._taken[index])]
        if most is None or not unread:
            return slice(first, last), [self.pending(row) for row in self.reading]
        most = max(most // unit, 1) * unit
        start = min(unread, key=lambda index: self._taken[index].id)
        pieces = [self.pending(self._taken[start])[:most]]
        longest = len(pieces[0])
        for index in range(start + 1, last):
            pending = self.pending(self._taken[index])
            longest = max(longest, len(pending))
            level = self.cache.lengths[index] == self.cache.lengths[start]
            if not level or (len(pieces) + 1) * longest > most:
                break
            pieces.append(pending)
        return slice(start, start + len(pieces)), pieces

    def _note(self, index: int) -> None:
        """Bring the index up to the keys that a taken row has by now."""
        held = self._prefixes.lengths[index]
        self._prefixes.extend(index, self._taken[index].part(held, self.cache.lengths[index]))

    def _swap(self, one: int, other: int) -> None:
        """Exchange two places, taken or free, and whatever belongs to them."""
        if one == other:
            return
        self.cache.swap_rows(one, other)
        self._prefixes.swap(one, other)
        everything: tuple[list[Any], ...] = (self._joined, self._taken)
        for held in everything:
            if max(one, other) < len(held):
                held[one], held[other] = held[other], held[one]
