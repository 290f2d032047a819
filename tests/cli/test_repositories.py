"""What `orthrus convert` writes is opened and decoded with by transformers alone, from a directory as from the Hub."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TextStreamer, dynamic_module_utils

import orthrus
from orthrus.bench.peers.hf import plain
from orthrus.model.attachment import attachment_of, is_attached
from tests.cli.conftest import Ran

Cli = Callable[..., Ran]
NEW = 24


@pytest.fixture(autouse=True)
def modules_of_this_test(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """transformers keeps the Python files of repositories in a folder of its own."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture
def adapter(cli: Cli, model_dir: Path, tmp_path: Path) -> Path:
    ran = cli("convert", model_dir, tmp_path / "view", "--format", "adapter", "--backbone", model_dir)
    assert ran.code == 0, ran.err
    return tmp_path / "view"


def inputs_of(model: PreTrainedModel, tokenizer: Any, text: str = "Hello") -> dict[str, torch.Tensor]:
    return {**tokenizer([text, text[::-1]], return_tensors="pt")}


def test_a_plain_backbone_drafts_with_an_adapters_repository(adapter: Path, model_dir: Path) -> None:
    """Same tokens as without it; the view comes at the first call and stays; an option nobody honours is refused."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    inputs = inputs_of(model, tokenizer)
    expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    more = {"custom_generate": str(adapter), "trust_remote_code": True, "max_new_tokens": NEW, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **more), expected)
    view = attachment_of(model)
    assert torch.equal(model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **more), expected)
    assert attachment_of(model) is view
    assert torch.equal(model.generate(**inputs, max_new_tokens=NEW, do_sample=False), expected)
    with pytest.raises(orthrus.errors.ConfigError, match="num_beams"):
        model.generate(**inputs, **more, num_beams=2)


def test_stop_strings_and_streamers_reach_the_decoder(adapter: Path, model_dir: Path) -> None:
    """The text ends with the token that completes the string, and is streamed as it is written."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    inputs = {name: tensor[:1] for name, tensor in inputs_of(model, tokenizer).items()}
    prompt = inputs["input_ids"].shape[1]
    whole = tokenizer.decode(model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, prompt:])
    options = {"max_new_tokens": NEW, "do_sample": False, "stop_strings": [whole[6:8]], "tokenizer": tokenizer}
    expected = model.generate(**inputs, **options)
    written: list[str] = []

    class Collected(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            written.append(text)

    more = {"custom_generate": str(adapter), "trust_remote_code": True}
    found = model.generate(**inputs, **options, **more, streamer=Collected(tokenizer, skip_prompt=True))
    assert torch.equal(found, expected)
    assert "".join(written) == tokenizer.decode(expected[0, prompt:])


def test_a_repository_with_its_backbone_decodes_by_itself(cli: Cli, model_dir: Path, tmp_path: Path) -> None:
    """`from_pretrained` alone: its `generate` is the repository's."""
    ran = cli("convert", model_dir, tmp_path / "both", "--format", "hub", "--with-backbone")
    assert ran.code == 0, ran.err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "both", trust_remote_code=True)
    inputs = inputs_of(model, AutoTokenizer.from_pretrained(tmp_path / "both"))
    expected = type(model).generate(model, **inputs, max_new_tokens=NEW, do_sample=False)
    assert not is_attached(model)
    assert torch.equal(model.generate(**inputs, max_new_tokens=NEW, do_sample=False), expected)
    assert is_attached(model)


def test_the_official_layout_opens_and_drafts(cli: Cli, model_dir: Path, tmp_path: Path) -> None:
    """By the file that its `auto_map` names; also without it, as a plain Qwen3 model."""
    assert cli("convert", model_dir, tmp_path / "official", "--format", "official").code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "official", trust_remote_code=True, dtype=torch.float32)
    own, tokenizer = orthrus.load(tmp_path / "official")
    halved = {"trust_remote_code": True, "torch_dtype": torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "official", **halved).dtype == torch.bfloat16
    assert all(torch.equal(tensor, own.state_dict()[name]) for name, tensor in model.state_dict().items())
    inputs = inputs_of(model, tokenizer)
    expected = plain(own).generate(**inputs, max_new_tokens=NEW, do_sample=False)
    drafts: list[bool] = []
    model.register_forward_pre_hook(lambda _, __, kwargs: drafts.append("view" in kwargs), with_kwargs=True)
    assert torch.equal(model.generate(**inputs, max_new_tokens=NEW, do_sample=False, plan="full"), expected)
    assert all(drafts)
    drafts.clear()
    assert torch.equal(
        model.generate(**inputs, max_new_tokens=NEW, use_diffusion_mode=False, do_sample=False), expected
    )
    assert not any(drafts)


def test_an_adapter_for_others_names_no_directory(cli: Cli, model_dir: Path, tmp_path: Path) -> None:
    """`--format hub` asks for what `--push` asks for; the files by which transformers finds the view are listed."""
    ran = cli("convert", model_dir, tmp_path / "hub", "--format", "hub", "--backbone", model_dir)
    assert ran.code == 2
    assert "an adapter that others can load is required" in ran.err
    ran = cli("convert", model_dir, tmp_path / "hub", "--format", "hub", "--backbone", "some/backbone")
    assert ran.code == 0, ran.err
    assert "custom_generate/generate.py" in ran.out
    assert json.loads((tmp_path / "hub" / "orthrus_config.json").read_text())["backbone"] == "some/backbone"
    assert (tmp_path / "hub" / "custom_generate" / "requirements.txt").read_text().startswith("orthrus-lm>=")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "custom_generate" in card.split("---")[1]


def test_a_view_is_put_on_a_backbone_in_hand(adapter: Path, model_dir: Path) -> None:
    """The same object, with the adapter's tokenizer; it stays plain where there is none."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    with pytest.raises(orthrus.errors.ConfigError, match="has its dtype, device and quantization"):
        orthrus.load(adapter, backbone=model, dtype="bfloat16")
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (adapter / name).rename(adapter / f"hidden-{name}")
    model.config._name_or_path = model.name_or_path = str(adapter)
    with pytest.raises(orthrus.errors.CheckpointError, match="tokenizer"):
        orthrus.load(adapter, backbone=model)
    assert not is_attached(model)
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (adapter / f"hidden-{name}").rename(adapter / name)
    found, tokenizer = orthrus.load(adapter, backbone=model)
    assert found is model
    assert orthrus.generate(model, tokenizer, "Hello", max_new_tokens=8)[0].token_ids
    with pytest.raises(orthrus.errors.ConfigError, match="has a diffusion view already"):
        orthrus.load(adapter, backbone=model)
    assert is_attached(model)
