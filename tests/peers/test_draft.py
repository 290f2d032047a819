"""A small model drafts: texts are the large one's, drafts are what the small one would write."""

from pathlib import Path

import pytest

from orthrus.decode.engine import Engine
from orthrus.decode.options import Options
from orthrus.errors import ConfigError
from orthrus.model.attach import attach
from orthrus.model.config import OrthrusConfig
from orthrus.peers import draft
from orthrus.peers.draft import DraftModel
from orthrus.policy import steps
from orthrus.train.tokenizer import train_tokenizer
from tests import reference
from tests.families import tiny
from tests.train.tiny import TEXTS, saved_backbone, tiny_tokenizer

PROMPTS = [[5, 6, 7], [8], [30, 31, 32, 33, 34, 35], [9, 10, 11, 12, 13]]
COUNTS = [17, 7, 12, 1]


@pytest.mark.parametrize("plan", ["fixed:5", "tree:9"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_texts_are_the_large_model_s(family: str, rows: int, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the small one says: another family, a smaller vocabulary, windows; prompts read in pieces."""
    monkeypatch.setattr(draft, "CHUNK", 4)
    model = attach(tiny("qwen3"), OrthrusConfig(layers=()), attn_implementation="orthrus")
    small = tiny(family, seed=5, vocab_size=90)
    engine = Engine(model, rows=rows, capacity=96, plan=steps.parse(plan), drafter=DraftModel(model, small))
    done = engine.finish(PROMPTS, [Options(max_new_tokens=count) for count in COUNTS])
    plain = tiny("qwen3")
    assert [row.token_ids for row in done] == [
        reference.greedy_text(plain, p, n) for p, n in zip(PROMPTS, COUNTS, strict=True)
    ]


def test_a_model_that_drafts_for_itself_is_always_right() -> None:
    """Over two turns, the second with a start that is cached: all drafts are kept, so its keys are the right ones."""
    model = attach(tiny("qwen3"), OrthrusConfig(layers=()), attn_implementation="orthrus")
    drafter = DraftModel(model, tiny("qwen3"), proposals=5)
    engine = Engine(model, rows=2, capacity=96, plan=steps.parse("full"), drafter=drafter)
    done = engine.finish(PROMPTS[:2], Options(max_new_tokens=18))
    again = engine.finish([[*PROMPTS[0], *done[0].token_ids, 3]], Options(max_new_tokens=12))
    for row in (*done, *again):
        assert row.stats.accepted_per_position == [1.0] * 5
        assert row.stats.cycles == len(row.token_ids) // 6
    assert again[0].cached > 0
    assert done[0].stats.draft_passes == {"draft": 15}


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    """Its numbers stand for other words."""
    folder = saved_backbone(tmp_path / "large", tiny_tokenizer(), "qwen3")
    model = attach(tiny("qwen3", vocab_size=300), OrthrusConfig(layers=()), attn_implementation="orthrus")
    model.name_or_path = str(folder)
    small = saved_backbone(tmp_path / "small", tiny_tokenizer(), "llama")
    assert isinstance(draft.load(str(small), model), DraftModel)
    train_tokenizer([text[::-1] for text in TEXTS] * 40, vocab_size=300, max_length=256).save_pretrained(small)
    with pytest.raises(ConfigError, match="a draft model with the tokenizer"):
        draft.load(str(small), model)
    model.name_or_path = ""
    with pytest.raises(ConfigError, match="found a model without name_or_path: set"):
        draft.load(str(small), model)
