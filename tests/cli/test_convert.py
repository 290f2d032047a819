"""`orthrus convert`: there and back again, equal; what its card says; and nothing is written over by accident."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

import orthrus
from orthrus.checkpoints import files
from orthrus.model.fingerprint import backbone_tensors
from tests.cli.conftest import Ran

Cli = Callable[..., Ran]


def states(path: Path, dtype: str | None = None) -> dict[str, torch.Tensor]:
    model, _ = orthrus.load(path, dtype=dtype)
    return dict(model.state_dict())


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def official(cli: Cli, model_dir: Path, tmp_path: Path) -> Path:
    ran = cli("convert", model_dir, tmp_path / "official", "--format", "official")
    assert ran.code == 0, ran.err
    return tmp_path / "official"


def test_official_and_back_is_the_same_model(cli: Cli, model_dir: Path, official: Path, tmp_path: Path) -> None:
    names = set(files.read_tensors(official, "model.safetensors"))
    assert "model.layers.0.self_attn.q_proj_diff.weight" in names
    assert not any(".diffusion." in name or ".ar." in name for name in names)
    ran = cli("convert", official, tmp_path / "back", "--format", "adapter", "--with-backbone")
    assert ran.code == 0
    assert "orthrus.safetensors" in ran.out
    assert equal(states(tmp_path / "back"), states(model_dir))
    tokenizers = [orthrus.load(path)[1] for path in (model_dir, official, tmp_path / "back")]
    assert len({t.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) for t in tokenizers}) == 1


def test_the_backbone_beside_an_adapter_is_a_plain_model(cli: Cli, official: Path, tmp_path: Path) -> None:
    """Nothing of the official layout stays in its configuration."""
    assert cli("convert", official, tmp_path / "a", "--format", "adapter", "--with-backbone").code == 0
    values = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (values["architectures"], values["use_cache"]) == (["Qwen3ForCausalLM"], True)
    assert not {"auto_map", "block_size", "mask_token_id", "lora_alpha"} & values.keys()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    backbone = backbone_tensors(orthrus.load(official)[0])
    assert equal(dict(plain.named_parameters()), backbone)


def test_an_adapter_alone_names_its_backbone(cli: Cli, official: Path, model_dir: Path, tmp_path: Path) -> None:
    ran = cli("convert", official, tmp_path / "a", "--format", "adapter", "--backbone", model_dir)
    assert ran.code == 0
    assert not (tmp_path / "a" / "config.json").exists()
    assert equal(states(tmp_path / "a"), states(model_dir))


def test_an_adapter_that_names_no_backbone_is_converted_with_one(
    cli: Cli, nameless: Path, model_dir: Path, tmp_path: Path
) -> None:
    for name, more in (("a", ["adapter"]), ("b", ["adapter", "--with-backbone"]), ("c", ["official"])):
        ran = cli("convert", nameless, tmp_path / name, "--backbone", model_dir, "--format", *more)
        assert ran.code == 0, ran.err
        assert equal(states(tmp_path / name), states(model_dir))


def test_an_adapter_without_any_backbone_is_refused(cli: Cli, official: Path, tmp_path: Path) -> None:
    ran = cli("convert", official, tmp_path / "a", "--format", "adapter")
    assert (ran.code, ran.out) == (1, "")
    assert "--backbone" in ran.err
    assert not (tmp_path / "a").exists()


def test_the_precision_is_the_checkpoints_own_unless_given(cli: Cli, model_dir: Path, tmp_path: Path) -> None:
    assert cli("convert", model_dir, tmp_path / "b", "--format", "official", "--dtype", "bfloat16").code == 0
    assert cli("convert", tmp_path / "b", tmp_path / "c", "--format", "adapter", "--with-backbone").code == 0
    tensors = files.read_tensors(tmp_path / "c", "orthrus.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert equal(states(tmp_path / "c", "bfloat16"), states(tmp_path / "b", "bfloat16"))


def test_another_model_is_written_over_only_by_force(cli: Cli, model_dir: Path, official: Path, tmp_path: Path) -> None:
    """By force, no file of the other layout stays behind; files that are no model's do."""
    (official / "notes.txt").write_text("mine")
    before = {file.name: file.read_bytes() for file in official.iterdir()}
    command = ("convert", model_dir, official, "--format", "adapter", "--backbone", model_dir)
    ran = cli(*command)
    assert (ran.code, ran.out) == (1, "")
    assert "holds a model already" in ran.err
    assert {file.name: file.read_bytes() for file in official.iterdir()} == before
    assert cli(*command, "--force").code == 0
    assert not (official / "model.safetensors").exists()
    assert (official / "notes.txt").read_text() == "mine"
    assert equal(states(official), states(model_dir))


def test_the_card_says_what_it_is_and_how_to_load_it(cli: Cli, model_dir: Path, official: Path, tmp_path: Path) -> None:
    """Its head is the Hub's; the official layout names its other readers, an adapter its backbone."""
    card = ModelCard((official / "README.md").read_text())
    assert card.data.to_dict() == {
        "library_name": "orthrus-lm",
        "pipeline_tag": "text-generation",
        "tags": ["orthrus", "speculative-decoding", "diffusion", "qwen3"],
    }
    assert "| Block size | 8: an anchor and up to 7 drafts |" in card.text
    assert r"(`<\|mask\|>`)" in card.text
    assert 'orthrus.load("./official")' in card.text
    assert "modeling_orthrus.py" in card.text
    assert '"num_speculative_tokens": 7' in card.text
    assert "## Licence\n\nTo be filled in" in card.text
    assert "## Training" not in card.text
    assert cli("convert", official, tmp_path / "a", "--format", "adapter", "--backbone", model_dir).code == 0
    text = (tmp_path / "a" / "README.md").read_text()
    assert f"| Backbone | `{model_dir}`; qwen3" in text
    assert "base_model" not in text, "a directory is none that the Hub knows"
    assert "vllm" not in text


def test_the_card_takes_over_licence_and_training(cli: Cli, model_dir: Path, tmp_path: Path) -> None:
    """From the source's own card and from the run that it came out of; both stay as they were."""
    source, run_card = tmp_path / "run" / "model", "# run\n\n| | |\n|---|---|\n| Steps | 7 of 7 |\n\n## Recipe\n\n{}\n"
    shutil.copytree(model_dir, source)
    values = json.loads((source / "orthrus_config.json").read_text())
    named = {**values, "backbone": "some-one/Some-Model", "revision": "abc"}
    (source / "orthrus_config.json").write_text(json.dumps(named))
    (source / "README.md").write_text("---\nlicense: mit\n---\n\nMine.\n")
    (source.parent / "RUN.md").write_text(run_card)
    assert cli("convert", source, tmp_path / "b", "--format", "official").code == 0
    card = ModelCard((tmp_path / "b" / "README.md").read_text())
    assert (card.data.license, card.data.base_model) == ("mit", "some-one/Some-Model")
    assert "`some-one/Some-Model`, revision `abc`" in card.text
    assert "## Training\n\n| | |\n|---|---|\n| Steps | 7 of 7 |\n\n## Licence\n\nmit\n" in card.text
    assert (source / "README.md").read_text().endswith("Mine.\n")
    assert (source.parent / "RUN.md").read_text() == run_card


def test_a_card_that_is_there_stays(cli: Cli, model_dir: Path, tmp_path: Path) -> None:
    """Also by force, and the command says so."""
    out = tmp_path / "o"
    out.mkdir()
    (out / "README.md").write_text("mine")
    ran = cli("convert", model_dir, out, "--format", "official")
    assert ran.code == 0
    assert "stays as it was" in ran.err
    assert cli("convert", model_dir, out, "--format", "official", "--force").code == 0
    assert (out / "README.md").read_text() == "mine"
    assert equal(states(out), states(model_dir))


def test_a_model_is_never_written_over_itself(cli: Cli, model_dir: Path, tmp_path: Path) -> None:
    ran = cli("convert", model_dir, model_dir / ".." / model_dir.name, "--format", "official", "--force")
    assert ran.code == 1
    assert "is the model to convert" in ran.err
    (tmp_path / "file").write_text("")
    assert cli("convert", model_dir, tmp_path / "file", "--format", "official").code == 1


def test_an_interrupted_conversion_leaves_the_old_model_whole(
    cli: Cli, model_dir: Path, official: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    before = {file.name: file.read_bytes() for file in official.iterdir()}
    monkeypatch.setattr("orthrus.checkpoints.files.official_config", interrupted)
    assert cli("convert", model_dir, official, "--format", "official", "--force").code == 130
    assert {file.name: file.read_bytes() for file in official.iterdir()} == before
    assert [path.name for path in official.parent.iterdir()] == ["official"], "no scratch files either"


def test_a_gguf_is_one_file_that_is_not_written_over(cli: Cli, model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    ran = cli("convert", model_dir, out, "--format", "gguf", "--dtype", "bfloat16")
    assert ran.code == 0, ran.err
    assert "gguf, bfloat16" in ran.out
    before = out.read_bytes()
    ran = cli("convert", model_dir, out, "--format", "gguf")
    assert ran.code == 1
    assert "is there already" in ran.err
    assert out.read_bytes() == before
    assert cli("convert", model_dir, out, "--format", "gguf", "--force").code == 0
    assert out.read_bytes() != before
    assert "must be the name of a .gguf file" in cli("convert", model_dir, tmp_path, "--format", "gguf").err
    assert cli("convert", model_dir, out, "--format", "gguf", "--with-backbone").code == 2
    assert cli("convert", model_dir, out, "--format", "gguf", "--push", "me/model").code == 2
