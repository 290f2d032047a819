"""`orthrus bench peers` end to end on tiny untrained peers: texts are plain decoding's, records say what each is."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orthrus.bench.peers import contest, table
from orthrus.bench.peers.contest import Field, Peer
from orthrus.cli import main
from orthrus.data.records import read_records
from orthrus.errors import ConfigError, DataError
from orthrus.peers import blocks, dflash_files, eagle3_model
from orthrus.peers.blocks import BlocksConfig
from orthrus.peers.dflash import DFlash, DFlashConfig
from orthrus.peers.eagle3_model import Eagle3, Eagle3Config
from tests.families import tiny

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def weights(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of an EAGLE-3 and a DFlash drafter, a small model and a block-diffusion model, none of them trained."""
    folder = tmp_path_factory.mktemp("peers")
    model, tokenizer = loaded
    torch.manual_seed(0)
    eagle3_model.save(Eagle3(Eagle3Config.of(model, drafts=3)), model, folder / "eagle3")
    training = {"kind": "eagle3", "trainable": 1234567, "steps": 2, "rows": 16, "operations": 3.5e9}
    (folder / "eagle3" / "training.json").write_text(json.dumps(training))
    (folder / "dflash").mkdir()
    config = DFlashConfig.of(model, layers=1, taps=(0,), block_size=4, mask_token_id=299)
    dflash_files.save(DFlash(config), folder / "dflash")
    small = tiny("llama", vocab_size=300, num_hidden_layers=1)
    small.save_pretrained(folder / "small")
    tokenizer.save_pretrained(folder / "small")
    other = tiny("qwen3", vocab_size=300, num_hidden_layers=1, max_position_embeddings=512)
    blocks.save(other, BlocksConfig(block_size=4, shift=True, mask=299), folder / "blocks")
    return folder


def test_all_kinds_race_and_none_changes_a_text(
    weights: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Batches of one and of two; a second call has nothing to do; table, plots and records hold everyone."""
    output = tmp_path / "peers.jsonl"
    peers = ["orthrus", "orthrus@tree:5", "lookup", f"eagle3={weights}/eagle3", f"eagle3={weights}/eagle3@tree:6"]
    peers += [f"draft={weights}/small@fixed:4", f"blocks={weights}/blocks@0.5"]
    peers += ["hf-lookup", f"hf-draft={weights}/small", f"hf-dflash={weights}/dflash", f"dflash={weights}/dflash"]
    arguments = ["bench", "peers", str(model_folder), "--suite", "synthetic:json@heldout", "--limit", "2"]
    arguments += [
        "--rounds",
        "1",
        "--warmup",
        "0",
        "--max-new-tokens",
        "8",
        "--batch",
        "1",
        "--batch",
        "2",
        "--context",
        "9",
    ]
    arguments += ["--context", "9"]
    arguments += ["--cpu-time", "--markdown", "--output", str(output), "--plots", str(tmp_path / "plots")]
    arguments += [part for peer in peers for part in ("--peer", peer)]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    records = read_records(output)
    results = [r for r in records if r["kind"] == "result"]
    lossless = [r for r in results if not r["mode"].startswith("blocks")]
    assert all(r["identical"] for r in lossless)
    assert len(results) == 2 * (1 + len(peers)) + 2 * (1 + len(peers) - 4)  # four take one prompt at a time
    found = {(r["mode"], r["plan"]): r for r in records if r["kind"] == "peer"}
    assert len(found) == len(peers)
    eagle = found["eagle3", "full"]
    assert eagle["training"]["rows"] == 16
    assert eagle["key_bytes_per_token"] == 4 * (48 + 1 + 2 * 2 * 12)  # features, their store's values, keys and values
    assert [(cost["batch"], cost["context"]) for cost in eagle["costs"]] == [(1, None), (2, None), (1, 9), (2, 9)]
    assert all(cost["draft_seconds"] > 0 and cost["verify_seconds"] > 0 for cost in eagle["costs"])
    assert all("first_token_seconds" in r["stats"] for r in results if r["mode"] in ("ar", "eagle3", "orthrus"))
    assert "| 1.23 | 3.5e+09 | 16 |" in said
    assert "blocks 0.5" in said
    assert "| peer | batch 1, 9 tokens | batch 2, 9 tokens |" in said
    assert len(list((tmp_path / "plots").iterdir())) == 2
    assert main(arguments) == 0
    assert len(read_records(output)) == len(records)
    assert table.CAVEATS[0] in capsys.readouterr().out


@pytest.mark.parametrize("peer", ["hf-draft={}/small", "hf-dflash={}/dflash"])
def test_drafters_in_transformers_loop_keep_rotary_frequencies_in_float32(
    peer: str, weights: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded ones shift positions; weights are in the model's dtype."""
    taken: dict[str, Any] = {}
    monkeypatch.setattr(contest.hf, "decoder", lambda *_, **more: taken.update(more))
    model = copy.deepcopy(loaded[0]).to(torch.bfloat16)
    contest._transformers(Peer.parse(peer.format(weights)), model, ())
    small = taken["assistant_model"]
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in small.buffers()} == {torch.float32}
    assert not small.training


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("medusa=x", "a peer is of a kind of"),
        ("eagle3", "needs weights"),
        ("lookup=x", "has no weights"),
        ("orthrus@sideways", "a plan is"),
        ("blocks=x@7.5", "unmasking is"),
        ("hf-lookup@full", "has no plans"),
        ("lookup@full", "are those of the peer lookup"),
        ("eagle3=x@lookup:4", "are those of the peer lookup"),
    ],
)
def test_peers_that_cannot_be_are_refused(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Peer.parse(text)


def test_names_are_those_of_the_weights_where_they_say_more() -> None:
    assert Peer.parse("eagle3=runs/peers/eagle3/model").label == "eagle3"
    assert Peer.parse("eagle3=runs/peers/two-steps/model@tree:31").label == "eagle3:two-steps"
    assert Peer.parse("orthrus").contender.plan == "full"


def test_peers_are_told_apart_by_samples_of_their_weights(tmp_path: Path) -> None:
    """Other numbers of the same size, and more of the same; a source without safetensors stands for itself."""
    peer, file = Peer.parse(f"dflash={tmp_path}"), tmp_path / "model.safetensors"
    assert peer.weights() == str(tmp_path)
    found = set()
    for fill, size in ((0, 300), (1, 300), (0, 301), (0, 1 << 20), (1, 1 << 20)):
        file.write_bytes(bytes([fill]) * size)
        found.add(peer.weights())
    assert len(found) == 5


def test_two_peers_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="found eagle3 full more than once"):
        Field(
            peers=[Peer.parse("eagle3=runs/one/eagle3/model"), Peer.parse("eagle3=runs/two/eagle3/model")],
            load=lambda source: pytest.fail(source),
        )


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (["--peer", "dflash=none/such"], "none/such"),
        (["--peer", "orthrus", "--context", "100000"], "--context must be at most"),
    ],
)
def test_a_race_that_cannot_be_writes_nothing(
    extra: list[str], reason: str, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "peers.jsonl"
    arguments = ["bench", "peers", str(model_folder), "--suite", "synthetic:json@heldout", "--limit", "1"]
    assert main([*arguments, "--output", str(output), *extra]) != 0
    assert reason in " ".join(capsys.readouterr().err.split())
    assert not output.exists()


def test_half_a_drafter_is_refused_before_the_race(
    weights: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its configuration is there, its weights are not."""
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text((weights / "dflash" / "config.json").read_text())
    output = tmp_path / "peers.jsonl"
    arguments = ["bench", "peers", str(model_folder), "--suite", "synthetic:json@heldout", "--limit", "1"]
    assert main([*arguments, "--output", str(output), "--peer", f"dflash={tmp_path}/half"]) != 0
    assert "must hold model.safetensors" in " ".join(capsys.readouterr().err.split())
    assert not output.exists()


def test_a_file_without_results_has_no_table(tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError, match="at least one result line"):
        table.tables(tmp_path / "none.jsonl")
