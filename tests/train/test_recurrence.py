"""Recurrent layers in training: packed rows and blocks against each document and each prefix read alone."""

import pytest
import torch
from torch import Tensor

from orthrus.model.attach import attach
from orthrus.model.config import OrthrusConfig
from orthrus.model.mixer import mix, mixes
from orthrus.train import frozen
from orthrus.train.recurrence import OverBlocks, OverRows, documents_apart
from tests.families import HYBRID, VOCAB, tiny

LENGTHS = (23, 64, 1, 70, 41, 3)  # of a row's documents: some end at a chunk's end, some are shorter than the taps


def packed() -> tuple[Tensor, Tensor, Tensor]:
    """Two packed rows `[2, T]`, their documents in two orders behind one another, and padding: ids, places, tokens."""
    rows = [[i for i, n in enumerate(lengths) for _ in range(n)] + [-1] * 5 for lengths in (LENGTHS, LENGTHS[::-1])]
    document = torch.tensor(rows)
    position = torch.tensor([[row[:t].count(name) for t, name in enumerate(row)] for row in rows])
    return document, position, torch.randint(VOCAB, document.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", HYBRID)
def test_packed_documents_are_read_as_if_each_stood_alone(family: str) -> None:
    """Hidden states of every document, wherever it begins, are those of a plain call over it alone."""
    model = tiny(family)
    document, position, token = packed()
    same = (document[:, :, None] == document[:, None, :]).tril()
    mask = torch.zeros(same.shape).masked_fill(~same, torch.finfo(torch.float32).min)[:, None]
    with torch.no_grad(), documents_apart(model, document):
        found = model.base_model(input_ids=token, position_ids=position, attention_mask=mask, use_cache=False)[0]
    assert not any("forward" in vars(module) for module in model.modules())
    for row, ids in enumerate(document):
        for name in range(len(LENGTHS)):
            own = ids == name
            with torch.no_grad():
                expected = model.base_model(input_ids=token[row : row + 1, own], use_cache=False)[0][0]
            torch.testing.assert_close(found[row, own], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", HYBRID)
def test_drafters_are_trained_on_documents_read_alone(family: str) -> None:
    """The frozen pass that drafters read: hidden states and taps of the last document do not depend on the others."""
    model = attach(tiny(family), OrthrusConfig(layers=()), attn_implementation="orthrus").eval()
    document, position, token = (part[:1] for part in packed())
    last = document[0] == len(LENGTHS) - 1
    whole = frozen.read(model, token, document, position, (0,))
    alone = frozen.read(model, token[:, last], document[:, last], position[:, last], (0,))
    torch.testing.assert_close(whole.hidden_BTC[:, last], alone.hidden_BTC, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole.tapped[0][:, last], alone.tapped[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", HYBRID)
def test_blocks_start_anywhere_as_if_their_document_had_been_read_up_to_there(family: str) -> None:
    """Three blocks of four tokens in each of two rows, one at a document's first token: equal to reading on."""
    layer = next(module for module in tiny(family).modules() if mixes(module))
    document, _, _ = packed()
    torch.manual_seed(1)
    text = torch.randn(*document.shape, 32)
    blocks = torch.randn(2, 12, 32)
    anchor = torch.tensor([[0, 100, 157], [3, 70, 190]])
    with torch.no_grad():
        rows = OverRows(document)
        mix(layer, text, rows)
        found = mix(layer, blocks, OverBlocks(rows, anchor))
        for row in range(2):
            for n, at in enumerate(anchor[row].tolist()):
                start = int((document[row] == document[row, at]).nonzero()[0])
                block = blocks[row, 4 * n : 4 * n + 4]
                whole = layer(torch.cat([text[row, start:at], block])[None])[0]
                torch.testing.assert_close(found[row, 4 * n : 4 * n + 4], whole[-4:], rtol=1e-4, atol=1e-4)
