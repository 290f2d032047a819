"""Options are Hugging Face's by name; each is checked, and what is not honoured is refused by name."""

import math
import re
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from orthrus.decode.options import HONOURED, REFUSED, WITHOUT_EFFECT, Options, Sampling, from_generation_config
from orthrus.decode.processors import Request
from orthrus.errors import ConfigError

NAN = math.nan
SAMPLE = {"do_sample": True}


def test_defaults_are_greedy() -> None:
    """Nothing asked: 256 tokens of greedy text, no end-of-text token, seed 0."""
    assert Options.of() == Options(max_new_tokens=256, sampling=Sampling(), eos_token_id=(), stop_strings=(), seed=0)
    assert Options.of(max_new_tokens=None, temperature=None, eos_token_id=None) == Options.of()


def test_every_option_is_taken() -> None:
    """Under Hugging Face's names, with lists where it has them."""
    options = Options.of(
        max_new_tokens=7, do_sample=True, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1,
        repetition_penalty=1.2, eos_token_id=[3, 4], stop_strings=["a", "b"], seed=9,
    )  # fmt: skip
    sampling = Sampling(do_sample=True, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2)
    assert options == Options(max_new_tokens=7, sampling=sampling, eos_token_id=(3, 4), stop_strings=("a", "b"), seed=9)
    assert Options.of(eos_token_id=0, stop_strings="end").eos_token_id == (0,)
    assert Options.of(stop_strings="end").stop_strings == ("end",)


def test_end_of_text_comes_from_the_model_unless_asked() -> None:
    """Only that: a model's own sampling defaults do not turn greedy decoding into sampling."""
    defaults = GenerationConfig(eos_token_id=[5, 6], do_sample=True, temperature=0.6, top_k=20)
    assert Options.of(defaults) == Options(eos_token_id=(5, 6))
    assert Options.of(defaults, eos_token_id=7).eos_token_id == (7,)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: Input should be greater than 0, found 0"),
        ({"max_new_tokens": -1}, "max_new_tokens: Input should be greater than 0, found -1"),
        ({"max_new_tokens": 2.0}, "max_new_tokens: Input should be a valid integer"),
        ({"max_new_tokens": True}, "max_new_tokens: Input should be a valid integer"),
        ({"do_sample": 1}, "do_sample: Input should be a valid boolean, found 1"),
        (SAMPLE | {"temperature": NAN}, "temperature: Input should be a finite number, found nan"),
        (SAMPLE | {"temperature": 0}, "temperature: Input should be greater than 0, found 0"),
        (SAMPLE | {"temperature": -0.5}, "temperature: Input should be greater than 0"),
        (SAMPLE | {"temperature": math.inf}, "temperature: Input should be a finite number, found inf"),
        (SAMPLE | {"temperature": "hot"}, "temperature: Input should be a valid number, found 'hot'"),
        (SAMPLE | {"temperature": True}, "temperature: Input should be a valid number"),
        (SAMPLE | {"top_p": 0}, "top_p: Input should be greater than 0, found 0"),
        (SAMPLE | {"top_p": 1.01}, "top_p: Input should be less than or equal to 1, found 1.01"),
        (SAMPLE | {"top_p": NAN}, "top_p: Input should be a finite number, found nan"),
        (SAMPLE | {"top_k": -1}, "top_k: Input should be greater than or equal to 0, found -1"),
        (SAMPLE | {"top_k": 2.5}, "top_k: Input should be a valid integer"),
        (SAMPLE | {"min_p": 1.5}, "min_p: Input should be less than or equal to 1, found 1.5"),
        (SAMPLE | {"min_p": NAN}, "min_p: Input should be a finite number, found nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: Input should be greater than 0"),
        ({"repetition_penalty": NAN}, "repetition_penalty: Input should be a finite number"),
        ({"eos_token_id": -2}, "eos_token_id: Input should be greater than or equal to 0, found -2"),
        ({"seed": 2**63}, "seed: Input should be less than or equal to 9223372036854775807, found 9223372036854775808"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id: Input should be a valid integer, found 'x'"),
        ({"stop_strings": [""]}, "stop_strings: String should have at least 1 character, found ''"),
        ({"stop_strings": [3]}, "stop_strings: Input should be a valid string, found 3"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0, found -1"),
        ({"seed": 0.5}, "seed: Input should be a valid integer"),
        ({"temperature": 0.7}, "temperature has an effect only when sampling: add do_sample=True"),
        ({"top_k": 5, "do_sample": False}, "top_k has an effect only when sampling"),
        ({"min_p": 0.5}, "min_p has an effect only when sampling"),
    ],
)
def test_values_out_of_range_are_refused(asked: dict[str, object], message: str) -> None:
    """The option, the range and the value found are named."""
    with pytest.raises(ConfigError, match=message):
        Options.of(None, **asked)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_new_token", "did you mean 'max_new_tokens'"),
        ("temprature", "did you mean 'temperature'"),
        ("top_kk", "did you mean 'top_k'"),
        ("stop", "did you mean 'stop_strings'"),
        ("max_tokens", "did you mean 'max_new_tokens'"),
        ("best_of", "it honours: bad_words_ids, begin_suppress_tokens"),
        ("num_beams", "beam search keeps several texts"),
        ("penalty_alpha", "contrastive search needs"),
        ("dola_layers", "DoLa needs"),
        ("max_length", "give max_new_tokens"),
        ("num_return_sequences", "give the prompt as often"),
    ],
)
def test_unknown_options_are_refused_with_a_hint(name: str, hint: str) -> None:
    """A typo names what was meant, an option that cannot be honoured the reason; anything else gets the list."""
    with pytest.raises(ConfigError, match=f"'{name}' is not honoured by this decoder.*{hint}"):
        Options.of(None, **{name: 1})


# ---------------------------------------------------------------- whole generation configs


def filled(**values: object) -> GenerationConfig:
    """A config as `generate` hands it over: every default written in."""
    config = GenerationConfig(**values)
    config.update(**config._get_default_generation_params(), defaults_only=True)
    return config


def test_a_whole_config_is_honoured() -> None:
    """Values that `generate` writes in ask for nothing; sampling values of a greedy config are idle there too."""
    assert from_generation_config(filled(max_new_tokens=5)) == Options(max_new_tokens=5)
    assert from_generation_config(filled(max_new_tokens=5, eos_token_id=0)).eos_token_id == (0,)
    sampled = from_generation_config(filled(max_new_tokens=5, do_sample=True, temperature=0.5, min_p=0.2))
    assert sampled.sampling == Sampling(do_sample=True, temperature=0.5, top_k=50, min_p=0.2)
    idle = GenerationConfig(max_new_tokens=5, repetition_penalty=1.5)
    idle.temperature, idle.top_p = 0.6, 0.9
    assert from_generation_config(idle).sampling == Sampling(repetition_penalty=1.5)
    assert from_generation_config(GenerationConfig(max_length=99), max_new_tokens=4).max_new_tokens == 4


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 4),
        ("penalty_alpha", 0.6),
        ("cache_implementation", "static"),
        ("output_hidden_states", True),
        ("encoder_repetition_penalty", 2.0),
        ("guidance_scale", 1.5),
        ("num_return_sequences", 2),
        ("output_scores", True),
        ("prompt_lookup_num_tokens", 3),
        ("made_up", 1),
    ],
)
def test_settings_of_a_config_that_are_not_honoured_are_refused(name: str, value: object) -> None:
    """By name, however they got there."""
    config = filled(max_new_tokens=5, do_sample=True)
    setattr(config, name, value)
    with pytest.raises(ConfigError, match=f"'{name}' is not honoured"):
        from_generation_config(config)


def test_a_config_s_processed_options_are_taken() -> None:
    """Values that ask for nothing make no processor; others do, and warpers only when sampling."""
    assert from_generation_config(filled(max_new_tokens=5, min_length=0, typical_p=1.0)).processors is None
    idle = filled(max_new_tokens=5)
    idle.typical_p = 0.5
    assert from_generation_config(idle).processors is None
    config = filled(max_new_tokens=5, do_sample=True, typical_p=0.5, suppress_tokens=[3], temperature=0.5)
    options = from_generation_config(config)
    assert options.processors is not None
    request = Request(4, 0, 5, (), 96, torch.device("cpu"))
    made = [type(processor).__name__ for processor in options.processors(request)]
    assert made == [
        "SuppressTokensLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TypicalLogitsWarper",
    ]


def test_seeds_are_fresh_unless_given() -> None:
    """Sampled calls draw one each from torch's generator, which decides; greedy ones draw nothing."""
    torch.manual_seed(4)
    first, second = Options.of(do_sample=True).seed, Options.of(do_sample=True).seed
    assert first != second
    torch.manual_seed(4)
    assert Options.of().seed == 0
    assert Options.of(do_sample=True).seed == first
    assert Options.of(do_sample=True, seed=7).seed == Options.of(seed=7).seed == 7
    assert Options.of(seed=2**63 - 1).seed == 2**63 - 1


def test_end_tokens_come_as_tensors_and_as_none() -> None:
    """-1 is what configurations write for none."""
    assert Options.of(eos_token_id=torch.tensor([3, 4])).eos_token_id == (3, 4)
    assert Options.of(eos_token_id=torch.tensor(3)).eos_token_id == (3,)
    assert Options.of(GenerationConfig(eos_token_id=5), eos_token_id=-1).eos_token_id == ()


@pytest.mark.parametrize(("name", "value"), [("max_new_tokens", 0), ("temperature", 0), ("top_p", 0.0)])
def test_a_zero_in_a_config_is_not_taken_for_off(name: str, value: float) -> None:
    """Zero is a value asked for, and out of range."""
    config = filled(max_new_tokens=5, do_sample=True)
    setattr(config, name, value)
    with pytest.raises(ConfigError, match=name):
        from_generation_config(config)


def test_max_length_alone_is_refused() -> None:
    """It counts the prompt too, which an option of one completion cannot."""
    with pytest.raises(ConfigError, match="max_new_tokens is required"):
        from_generation_config(GenerationConfig(max_length=20))


# ---------------------------------------------------------------- documentation


def documented() -> dict[str, tuple[str, str]]:
    """Options in the table of docs/compatibility.md: what `generate` and `hf_generate` do with each."""
    text = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text()
    table = text.partition("## Generation options")[2].partition("\n## ")[0]
    rows = [row.split("|")[1:4] for row in table.splitlines() if row.startswith("| `")]
    return {name: (own.strip(), hf.strip()) for names, own, hf in rows for name in re.findall(r"`(\w+)`", names)}


def test_the_table_of_options_says_what_the_code_does() -> None:
    """Every option of transformers and of ours is in it, as honoured or, with the reason in the code, as refused."""
    table = documented()
    assert {name for name, (own, _) in table.items() if own == "yes"} == {*HONOURED}
    assert {name for name, (own, hf) in table.items() if (own, hf) == ("no", "no")} <= {*REFUSED}
    for name in table.keys() - {*HONOURED}:
        with pytest.raises(ConfigError, match=f"generation option '{name}' is not honoured"):
            Options.of(**{name: 3})
    settings = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert settings - WITHOUT_EFFECT <= table.keys()
    assert {*REFUSED} <= table.keys()


def test_hf_generate_refuses_what_the_table_says() -> None:
    """Those settings of a config that the last column denies, and no others."""
    settings = vars(GenerationConfig()).keys() - WITHOUT_EFFECT
    values = {"num_beams": 2, "num_return_sequences": None, "output_scores": None, "output_logits": None}
    for name, (_, hf) in documented().items():
        if name in settings and hf == "no" and name != "stop_strings":
            config = filled(max_new_tokens=5)
            setattr(config, name, values.get(name, 3))
            with pytest.raises(ConfigError, match=f"'{name}' is not honoured"):
                from_generation_config(config)
