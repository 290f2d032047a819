"""View training end to end on tiny backbones: the block pass is the decoder's own draft pass, and it learns."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from orthrus.checkpoints import files
from orthrus.decode.api import engine_for
from orthrus.decode.options import Options
from orthrus.decode.output import Stats
from orthrus.decode.passes import Passes, Proposal
from orthrus.errors import CheckpointError, ConfigError
from orthrus.model.attach import attach, config_of
from orthrus.model.config import OrthrusConfig
from orthrus.model.head import output_head
from orthrus.policy import steps
from orthrus.train import answered, frozen, view
from orthrus.train.answered import decoded_by
from orthrus.train.loop import train
from orthrus.train.prepare import train_prompts
from orthrus.train.view import TeacherKeys, Twice, ViewTask
from tests.families import HYBRID, perturb, tiny
from tests.train.tiny import drafted, one_row, saved_backbone, view_recipe


@pytest.fixture
def task(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> ViewTask:
    """A view task on a tiny Qwen3 backbone."""
    return ViewTask(view_recipe(saved_backbone(tmp_path / "backbone", tokenizer, "qwen3"), tmp_path / "run"))


ALIKE = [(family, {}) for family in ("qwen3", "gemma3_text", "gpt_oss", "llama", *HYBRID)]
OTHERWISE = [
    {"block_recurrence": "bidirectional"},
    {"block_recurrence": "bidirectional", "block_attention": "causal"},
    {"layers": "attention"},
]


@pytest.mark.parametrize(("family", "more"), [*ALIKE, *(("qwen3_5_text", more) for more in OTHERWISE)])
def test_the_training_pass_is_the_decoders_draft_pass(
    family: str, more: dict[str, str], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """For every drawn block, hidden states from the packed pass give the logits a draft pass gives at that place.

    The second document of a packed row must look as if it stood alone; windows are shorter than the texts.
    """
    backbone = saved_backbone(tmp_path / "backbone", tokenizer, family)
    model = {"backbone": str(backbone), "block_size": 6, **more}
    task = ViewTask(view_recipe(backbone, tmp_path / "run", model=model, answers={"by": "given"}))
    model = task.model
    perturb(model)
    document, position, token, answer = one_row(task, 23, 31)
    from orthrus.train import anchors

    blocks = anchors.sample(
        document,
        answer,
        blocks=10,
        block_length=6,
        blind_share=0.4,
        shown_share=0.5,
        generators=[torch.Generator().manual_seed(0)],
    )
    assert blocks.shown_BN.any()
    keys = TeacherKeys(document)
    with torch.no_grad():
        frozen.read(task.model, token, document, position, keys=keys)
        hidden = task._student(keys, token, document, position, blocks, 6)
        logits = output_head(model)(hidden)
    for n in range(10):
        anchor = int(blocks.anchor_BN[0, n])
        own = (document[0] == document[0, anchor]).nonzero()[0]
        prefix = token[0, int(own) : anchor].tolist()
        first = torch.where(blocks.blind_BN[:, n], config_of(model).mask, token[:, anchor])
        shown = token[:, anchor + 1 : anchor + 1 + int(blocks.shown_BN[0, n])]
        if shown.shape[1] < int(blocks.shown_BN[0, n]):
            continue  # the row ends before the block is shown all; nothing of it is scored
        expected = drafted(model, prefix, first, shown)
        torch.testing.assert_close(logits[0, n, :-1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_text"])
def test_training_moves_every_twin_tensor_and_no_other_bit(
    family: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """After a few steps the saved view, loaded onto a fresh backbone, drafts the same; the backbone is untouched."""
    task = ViewTask(view_recipe(saved_backbone(tmp_path / "backbone", tokenizer, family), tmp_path / "run"))
    model = task.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = train(task, task._recipe)
    assert result.finished
    after = model.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {name for name in after if ".diffusion." in name}
    fresh = tiny(family, vocab_size=300)
    attach(fresh, files.read_config(tmp_path / "run" / "model"), attn_implementation="orthrus")
    files.load_adapter(fresh, tmp_path / "run" / "model")
    prompt = [5, 6, 7, 8]
    assert torch.equal(drafted(fresh, prompt, torch.tensor([9])), drafted(model, prompt, torch.tensor([9])))


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "qwen3_5_text"])
def test_computing_the_block_pass_again_changes_no_gradient(
    family: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """With gradient checkpointing, loss and every gradient are those without, bit for bit; decoding is untouched."""
    backbone = saved_backbone(tmp_path / "backbone", tokenizer, family)
    found = []
    for again in (False, True):
        model = {"backbone": str(backbone), "block_size": 6, "gradient_checkpointing": again}
        task = ViewTask(view_recipe(backbone, tmp_path / "run", model=model))
        loss = task.loss(np.array([0]), step=0)
        loss.total.backward()
        found.append((loss.total.detach(), {name: p.grad for name, p in task.trainable().items()}))
        assert not any("forward" in vars(module) for module in task.model.modules())
    (plain, expected), (total, gradients) = found
    assert torch.equal(total, plain)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())


def test_an_interrupted_view_run_ends_with_the_same_weights(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Stopped after two steps and taken up by a new process' objects, the run ends bit for bit as if never stopped."""
    backbone = saved_backbone(tmp_path / "backbone", tokenizer, "qwen3")
    whole = ViewTask(view_recipe(backbone, tmp_path / "whole"))
    train(whole, whole._recipe)
    recipe = view_recipe(backbone, tmp_path / "parts")

    class Crash(Exception):
        pass

    class Crashing(ViewTask):
        def loss(self, rows: Any, step: int) -> Any:
            if step == 3:
                raise Crash
            return super().loss(rows, step)

    with pytest.raises(Crash):
        train(Crashing(recipe), recipe)
    resumed = ViewTask(recipe)
    train(resumed, recipe)
    left, right = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_memorised_set_is_drafted_almost_whole(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Trained on one prompt's answer until it knows it, the view lets a cycle write more than 5 tokens of 6 there."""
    backbone = saved_backbone(tmp_path / "backbone", tokenizer, "qwen3")
    task = ViewTask(
        view_recipe(
            backbone,
            tmp_path / "run",
            responses={"prompts": 1, "eval_prompts": 1, "eval_tokens": 24},
            objective={"loss": "cross_entropy", "block_lengths": [6], "blind_anchor_share": 0.0, "blocks_per_row": 24},
            optimizer={"lr": 0.02},
            schedule={"steps": 150, "warmup_steps": 5, "kind": "cosine"},
            run={"batch_rows": 1, "eval_every": 1000, "checkpoint_every": 1000, "log_every": 50},
        )
    )
    prompts = [prompt.token_ids for prompt in train_prompts(task._recipe, tokenizer)]
    untrained = decoded_by(task.model, prompts, task._recipe.responses.eval_tokens).tokens_per_cycle
    train(task, task._recipe)
    assert decoded_by(task.model, prompts, task._recipe.responses.eval_tokens).tokens_per_cycle > max(5.0, untrained)


def test_an_evaluation_says_what_each_plan_gives(task: ViewTask) -> None:
    """Both plans' figures are those of real decoding under `full` and under `onepass` with a block per stop."""
    perturb(task.model)
    prompts = next(iter(task._data.heldout_prompts.values()))
    options = Options.of(task.model.generation_config, max_new_tokens=12)
    with torch.no_grad():
        figures = task.evaluate(0)
    for name, prefix in (("full", ""), ("onepass", "onepass_")):
        engine = engine_for(task.model, prompts, options, steps.parse(name), rows=1)
        for ids in prompts:
            engine.add(ids, options)
        done = []
        while engine.busy:
            done += [p.row.stats for p in engine.step() if p.row.finish_reason is not None]
        stats = Stats.total(done)
        (source,) = task._data.heldout
        for metric in ("tokens_per_cycle", "tokens_per_forward"):
            assert figures[f"heldout/{source}/{prefix}{metric}"] == getattr(stats, metric)


def test_held_out_prompts_that_were_not_packed_are_not_decoded(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """One that is longer than the backbone reads does not end the run; the others keep the order of their file."""
    asked = ["one two three four five", "seven " * 300, "one", "two", "three"]
    (tmp_path / "chats.jsonl").write_text(
        "".join(json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n" for text in asked)
    )
    source = {"kind": "jsonl", "path": str(tmp_path / "chats.jsonl"), "weight": 1.0, "heldout": 3}
    backbone = saved_backbone(tmp_path / "backbone", tokenizer, "qwen3")
    recipe = view_recipe(backbone, tmp_path / "run", data={"sources": [source]}, schedule={"steps": 3})
    task = ViewTask(recipe)
    chats = [tokenizer.decode(ids) for ids in task._data.heldout_prompts["chats"]]
    assert ["five" in chat for chat in chats] == [True, False]
    assert train(task, recipe).finished


@pytest.mark.parametrize("further", [False, True])
def test_rows_that_the_backbone_cannot_read_are_refused(
    further: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Before any prompt is answered, with an untrained view and with one to start from."""
    backbone = saved_backbone(tmp_path / "backbone", tokenizer, "qwen3")
    start = files.save(attach(tiny("qwen3", vocab_size=300)), tmp_path / "begun") if further else None
    model = {"backbone": str(backbone), "start_from": str(start)} if further else {"backbone": str(backbone)}
    with pytest.raises(ConfigError, match=r"data\.row_tokens must be at most 256, .* found 257"):
        ViewTask(view_recipe(backbone, tmp_path / "run", model=model, data={"row_tokens": 257}))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_an_error_of_the_recipe(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Not torch's own, with its traceback."""
    backbone = saved_backbone(tmp_path / "backbone", tokenizer, "qwen3")
    with pytest.raises(ConfigError, match="device 'cuda' cannot be used here"):
        ViewTask(view_recipe(backbone, tmp_path / "run", run={"device": "cuda"}))


def test_a_process_has_its_device_before_the_backbone_goes_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate settles which of several GPUs "cuda" is: before that all processes would load onto the first."""
    order: list[str] = []

    class Loaded(Exception):
        pass

    def load(*_: Any) -> Any:
        order.append("backbone")
        raise Loaded

    monkeypatch.setattr(answered, "Ranks", lambda device: order.append("ranks"))
    monkeypatch.setattr(answered, "device_of", lambda device: order.append("device"))
    monkeypatch.setattr(view, "load_backbone", load)
    with pytest.raises(Loaded):
        ViewTask(view_recipe(tmp_path, tmp_path / "run"))
    assert order == ["ranks", "device", "backbone"]


def test_two_steps_take_three_passes_a_cycle(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second pass of each cycle is shown the first half of the first one's drafts."""
    backbone = saved_backbone(tmp_path / "backbone", tokenizer, "qwen3")
    task = ViewTask(view_recipe(backbone, tmp_path / "run", objective={"shown_share": 0.5, "blind_anchor_share": 0.0}))
    perturb(task.model)
    prompts = next(iter(task._data.heldout_prompts.values()))
    with torch.no_grad():
        figures = task.evaluate(0)
        real, passes = Passes.draft, list[tuple[Proposal, torch.Tensor | None]]()

        def draft(*args: Any, shown_BJ: torch.Tensor | None = None) -> Proposal:
            passes.append((real(*args, shown_BJ=shown_BJ), shown_BJ))
            return passes[-1][0]

        monkeypatch.setattr(Passes, "draft", draft)
        two = decoded_by(task.model, prompts, task._recipe.responses.eval_tokens, Twice())
    most = len(prompts) + 3 * two.cycles
    assert most - len(prompts) <= two.forwards <= most  # a text that ends on a first token is not verified there
    for (made, nothing), (_, shown_BJ) in zip(passes[::2], passes[1::2], strict=True):
        assert nothing is None
        assert shown_BJ is not None
        assert made.first_B1V is not None
        assert torch.equal(shown_BJ, torch.cat([made.first_B1V, made.logits_BMV], dim=1)[:, :2].argmax(-1))
    (source,) = task._data.heldout
    assert figures[f"heldout/{source}/two_steps_tokens_per_cycle"] == two.tokens_per_cycle
    assert not any("onepass" in name for name in figures)


@pytest.mark.parametrize("layout", ["adapter", "official"])
def test_a_view_is_trained_further_from_a_checkpoint(
    layout: files.Format, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """`start_from` gives the twin the checkpoint's tensors, the recipe its block length, and training moves them."""
    backbone = saved_backbone(tmp_path / "backbone", tokenizer, "qwen3")
    model = attach(AutoModelForCausalLM.from_pretrained(backbone), OrthrusConfig(block_size=8, mask_token_id=7))
    perturb(model)
    begun = files.save(model, tmp_path / "begun", format=layout)
    if layout == "official":
        tokenizer.save_pretrained(begun)
    recipe = view_recipe(backbone, tmp_path / "run", model={"start_from": str(begun)}, schedule={"steps": 2})
    task = ViewTask(recipe)
    expected = {name: tensor for name, tensor in model.state_dict().items() if ".diffusion." in name}
    assert task.trainable().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in task.trainable().items())
    assert config_of(task.model).block_size == 6
    assert config_of(task.model).mask == 7
    assert train(task, recipe).finished
    assert not any(torch.equal(tensor, expected[name]) for name, tensor in task.trainable().items())


def test_a_view_of_another_backbone_is_not_trained_further(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The fingerprint that an adapter carries must be the backbone's."""
    backbone = saved_backbone(tmp_path / "backbone", tokenizer, "qwen3")
    begun = files.save(attach(tiny("qwen3", vocab_size=300, seed=1)), tmp_path / "begun")
    with pytest.raises(CheckpointError, match="with fingerprint"):
        ViewTask(view_recipe(backbone, tmp_path / "run", model={"start_from": str(begun)}))
