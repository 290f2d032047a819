"""The block that vLLM's drafters read equals the plain description of it, slot by slot."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from orthrus.decode.options import Sampling
from orthrus.decode.sampling import Chooser, Context
from orthrus.integrations.vllm.block import NO_SLOT, Block, block_inputs, in_turn
from orthrus.model.markov import Before, Markov

MASK = 9
VOCABULARY = 20


def laid(length: int, room: int, pages: list[int], *, drafts: int = 3, page_size: int = 4, longest: int = 32) -> Block:
    """One row's block."""
    return block_inputs(
        torch.tensor([length]),
        torch.tensor([7]),
        torch.tensor([room]),
        torch.tensor([pages], dtype=torch.int32),
        drafts=drafts,
        page_size=page_size,
        mask=MASK,
        longest=longest,
    )


def test_the_block_starts_with_the_anchor_and_crosses_pages() -> None:
    block = laid(6, 12, [5, 2, 8])
    assert block.token_BK.tolist() == [[7, MASK, MASK, MASK]]
    assert block.position_BK.tolist() == [[6, 7, 8, 9]]
    assert block.slot_BK.tolist() == [[10, 11, 32, 33]]
    assert block.seen_B.tolist() == [10]


def test_nothing_is_written_past_the_row_s_own_pages() -> None:
    """vLLM reserves one position less than the block has; what the page table holds behind it is another row's."""
    block = laid(5, 8, [5, 2, 8])
    assert block.slot_BK.tolist() == [[9, 10, 11, NO_SLOT]]
    assert block.seen_B.tolist() == [8]


def test_nothing_is_written_past_the_longest_text_and_positions_stay_inside() -> None:
    block = laid(6, 12, [5, 2, 8], longest=8)
    assert block.slot_BK.tolist() == [[10, 11, NO_SLOT, NO_SLOT]]
    assert block.position_BK.tolist() == [[6, 7, 7, 7]]
    assert block.seen_B.tolist() == [8]


def test_a_row_of_padding_writes_nothing_and_sees_nothing() -> None:
    block = laid(6, 0, [0, 0, 0])
    assert block.slot_BK.tolist() == [[NO_SLOT] * 4]
    assert block.seen_B.tolist() == [0]


@given(data=st.data())
def test_rows_are_laid_independently_and_slots_are_unique(data: st.DataObject) -> None:
    """Every row equals its description in plain Python, and no two rows ever write one slot."""
    size, drafts = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    rows, width, longest = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6)), data.draw(st.integers(2, 30))
    table = torch.arange(1, rows * width + 1).view(rows, width)
    held = [data.draw(st.integers(0, width)) for _ in range(rows)]
    lengths = [data.draw(st.integers(1, width * size)) for _ in range(rows)]
    block = block_inputs(
        torch.tensor(lengths),
        torch.arange(rows),
        torch.tensor(held) * size,
        table,
        drafts=drafts,
        page_size=size,
        mask=MASK,
        longest=longest,
    )
    written = []
    for row, (length, pages) in enumerate(zip(lengths, held, strict=True)):
        for j in range(drafts + 1):
            position, end = length + j, min(pages * size, longest)
            slot = int(table[row, position // size]) * size + position % size if position < end else NO_SLOT
            assert block.slot_BK[row, j] == slot
            assert block.position_BK[row, j] == min(position, longest - 1)
            written += [slot] * (slot != NO_SLOT)
        assert block.seen_B[row] == min(length + drafts + 1, end)
        assert block.token_BK[row].tolist() == [row, *[MASK] * drafts]
    assert len(written) == len(set(written))


def test_slots_are_chosen_in_turn_as_the_own_engine_does() -> None:
    """Greedily, with a correction that decides: the same drafts, and not those of slots on their own."""
    generator = torch.Generator().manual_seed(0)
    markov = Markov(VOCABULARY, 4, device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        markov.before_VR.normal_(generator=generator)
    logits_BMV = torch.randn(3, 6, VOCABULARY, generator=generator)
    anchor_B = torch.tensor([1, 2, 3], dtype=torch.int32)
    asked: list[int] = []

    def choose(slot_BV: torch.Tensor, slot: int) -> torch.Tensor:
        asked.append(slot)
        return slot_BV.argmax(-1).int()

    drafts_BM = in_turn(logits_BMV, anchor_B, markov, choose)
    context = Context(torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long))
    own = Chooser(Sampling()).draft(logits_BMV, context, Before(anchor_B.long(), markov))
    assert drafts_BM.tolist() == own.tokens_BM.tolist() != logits_BMV.argmax(-1).tolist()
    assert asked == list(range(6))
