"""Fixed shapes of passes, which keep a token's logits independent of the pass it came in (`decode.exact`)."""

from bisect import bisect_left
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """Fix the shapes of a pass's AR rows.

    Attributes:
        widths: AR rows per text that a decoding pass may have, in ascending order; fewer are filled up to the next.
        chunks: the same of prefill passes.
        span: attention takes keys so many at a time; cache slots in reach are rounded up to a multiple of this, or
        tails: in decoding passes to whole spans and one of these, in ascending order, `span` the last, and
        chunk_tails: in prefill passes to whole spans and one of these.
        group: texts per decoding pass at most, a power of two; other numbers of them take several passes of smaller
            powers. Prefill passes carry one text.
    """

    widths: tuple[int, ...]
    chunks: tuple[int, ...]
    span: int
    tails: tuple[int, ...]
    chunk_tails: tuple[int, ...]
    group: int

    def width(self, tokens: int) -> int:
        """Return the width of a decoding pass over so many tokens per text, the largest one's at most."""
        return self.widths[bisect_left(self.widths, tokens)]

    def chunk(self, tokens: int) -> int:
        """Return the width of a prefill pass over so many tokens, the largest one's at most."""
        return self.chunks[bisect_left(self.chunks, tokens)]

    def reach(self, slots: int, *, prefill: bool = False) -> int:
        """Return how many slots a pass looks at that needs so many: whole spans and a tail at their end."""
        before = (slots - 1) // self.span * self.span
        tails = self.chunk_tails if prefill else self.tails
        return before + tails[bisect_left(tails, slots - before)]

    def capacity(self, positions: int) -> int:
        """Return the cache positions a row of so many tokens needs, fillers and rounding included."""
        return -(-(positions + max(self.chunks[-1], self.widths[-1])) // self.span) * self.span

    def parts(self, rows: slice) -> list[slice]:
        """Cut rows into passes of power-of-two sizes, the largest first."""
        parts, start, size = [], rows.start, self.group
        while start < rows.stop:
            while size > rows.stop - start:
                size //= 2
            parts.append(slice(start, start + size))
            start += size
        return parts
