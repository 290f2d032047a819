"""Everyone decodes the same weights to the same text."""

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orthrus.bench.contenders import ALONE, HF, OWN, contenders, decoders, fits
from orthrus.bench.peers import hf
from orthrus.bench.race import Contender
from orthrus.errors import ConfigError
from orthrus.model.attach import is_attached

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
PROMPTS = [[60, 61, 62, 60, 61, 62], [80, 81, 82], [90]]


def test_a_grid_gives_plans_to_orthrus_and_exactness_to_both_own_modes() -> None:
    made = contenders(["hf", "orthrus", "ar"], ["full", "fixed:4"], ["token", "distribution"])
    assert made == (
        Contender("hf"),
        Contender("orthrus", "full", "distribution"),
        Contender("orthrus", "fixed:4", "distribution"),
        Contender("orthrus", "full", "token"),
        Contender("orthrus", "fixed:4", "token"),
        Contender("ar", None, "distribution"),
        Contender("ar", None, "token"),
    )


@pytest.mark.parametrize(
    ("modes", "plans", "exacts", "named"),
    [
        (["vllm"], ["full"], ["token"], "vllm"),
        (["ar", "ar"], ["full"], ["token"], "once"),
        ([], ["full"], ["token"], "at least one"),
        (["orthrus"], ["fixed:x"], ["token"], "fixed:x"),
        (["orthrus"], ["full"], ["nearly"], "nearly"),
    ],
)
def test_what_is_not_known_or_named_twice_is_refused(
    modes: list[str], plans: list[str], exacts: list[str], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        contenders(modes, plans, exacts)


def test_prompt_lookup_takes_one_prompt_at_a_time() -> None:
    assert [mode for mode in OWN + HF if not fits(Contender(mode), 2)] == ["hf-lookup"]
    assert all(fits(Contender(mode), 1) for mode in ALONE)


def test_the_plain_backbone_shares_every_weight_and_leaves_the_model_attached(loaded: Loaded) -> None:
    model = loaded[0]
    backbone = hf.plain(model)
    assert {id(p) for p in backbone.parameters()} < {id(p) for p in model.parameters()}
    assert is_attached(model)
    assert not is_attached(backbone)


def test_all_contenders_write_the_same_text_alone_and_in_batches(loaded: Loaded) -> None:
    """In float32, every mode and plan, prompt lookup included, gives plain decoding's tokens."""
    everyone = contenders(OWN + HF, ["full", "fixed:3"])
    run = decoders(*loaded, everyone)
    expected = run[Contender("ar", None, "distribution")](PROMPTS, 10)
    assert len({tuple(answer.token_ids) for answer in expected}) == len(PROMPTS)
    for contender in everyone:
        if fits(contender, len(PROMPTS)):
            assert [a.token_ids for a in run[contender](PROMPTS, 10)] == [a.token_ids for a in expected]
        for prompt, answer in zip(PROMPTS, expected, strict=True):
            assert [a.token_ids for a in run[contender]([prompt], 10)] == [answer.token_ids]


def test_peers_stop_at_the_end_of_text_like_our_own_modes(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded
    free = decoders(model, tokenizer, contenders(["ar"]))
    end = next(iter(free.values()))([PROMPTS[0]], 20)[0].token_ids[5]
    monkeypatch.setattr(model.generation_config, "eos_token_id", end)
    for decode in decoders(model, tokenizer, contenders(OWN + HF)).values():
        answer = decode([PROMPTS[0]], 20)[0]
        assert answer.token_ids[-1] == end
        assert end not in answer.token_ids[:-1]
        assert answer.stats["emitted"] == len(answer.token_ids)


def test_forward_passes_are_counted(loaded: Loaded) -> None:
    """One per token for `generate`; fewer for prompt lookup, which finds the random model's loops."""
    run = decoders(*loaded, contenders(["hf", "hf-lookup"]))
    plain, lookup = (run[Contender(mode)]([PROMPTS[0] * 4], 60)[0].stats for mode in ("hf", "hf-lookup"))
    assert plain["forwards"] == plain["emitted"] == lookup["emitted"] == 60
    assert lookup["forwards"] < 60
    assert lookup["tokens_per_forward"] == 60 / lookup["forwards"]
