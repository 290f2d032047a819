"""DFlash and variants: the packed pass is the drafter's own, losses are the published ones, a short run decodes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GenerationConfig, MuseGlimmerAssistantModel, PreTrainedModel

import orthrus
from orthrus.decode.api import engine_for
from orthrus.decode.options import Options
from orthrus.kernels import masks
from orthrus.model.attachment import attachment_of
from orthrus.peers import dflash_files
from orthrus.policy import steps
from orthrus.train import anchors, frozen
from orthrus.train.anchors import Blocks
from orthrus.train.config import recipe_from_mapping
from orthrus.train.dflash import DFlashTask, filled
from orthrus.train.peer_sections import DFlashRecipe
from orthrus.train.plan import plan
from orthrus.train.run import run
from orthrus.train.step import batch
from tests import reference
from tests.train.tiny import one_row, saved_backbone, tiny_tokenizer, view_recipe

VARIANTS: dict[str, dict[str, Any]] = {
    "dflash": {},
    "dspark": {"shift": True, "markov_rank": 3},
    "jetspec": {"block_attention": "causal"},
}


def dflash_recipe(folder: Path, **sections: dict[str, Any]) -> DFlashRecipe:
    """A recipe small enough for a test; its backbone is made on the way."""
    if not (folder / "backbone").exists():
        saved_backbone(folder / "backbone", tiny_tokenizer(), "qwen3")
    tables = view_recipe(folder / "backbone", folder / "run").model_dump(mode="json")
    tables |= {
        "kind": "dflash",
        "model": {"backbone": str(folder / "backbone"), "block_size": 5, "draft_layers": 2},
        "objective": {"loss": "cross_entropy", "slot_decay": 7.0, "blocks_per_row": 10},
    }
    for name, keys in sections.items():
        tables[name] = {**tables[name], **keys}
    recipe = recipe_from_mapping(tables)
    assert isinstance(recipe, DFlashRecipe)
    return recipe


def drawn(task: DFlashTask, document: Tensor, answer: Tensor) -> Blocks:
    return anchors.sample(
        document,
        answer,
        blocks=10,
        block_length=task.model.config.proposals + 1,
        blind_share=0.0,
        generators=[torch.Generator().manual_seed(0)],
    )


def moved(task: DFlashTask) -> None:
    """Move the correction, which begins as nothing."""
    if task.model.markov is not None:
        torch.nn.init.normal_(task.model.markov.before_VR)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_packed_pass_is_the_drafter_s_own(variant: str, tmp_path: Path) -> None:
    """For every block: as if its document stood alone, cut at the anchor, and the block stood behind it."""
    task = DFlashTask(dflash_recipe(tmp_path, model=VARIANTS[variant]))
    own, config = task.model, task.model.config
    document, position, token, answer = one_row(task, 23, 31)  # type: ignore[arg-type]
    blocks = drawn(task, document, answer)
    with torch.no_grad():
        said = frozen.read(task._backbone, token, document, position, config.taps)
        hidden = filled(own, task._backbone, torch.cat(said.tapped, -1), token, document, position, blocks)
        for n in range(10):
            anchor = int(blocks.anchor_BN[0, n])
            first = int((document[0] == document[0, anchor]).nonzero()[0])
            T, K = anchor - first, config.block_size
            block = torch.tensor([[int(token[0, anchor])] + [config.mask_token_id] * (K - 1)])
            seen = torch.ones(1, K, T + K, dtype=torch.bool)
            where = torch.arange(T + K)[None]
            layer_masks = masks.layer_masks(
                seen.tril(T) if config.causal else seen,
                query_position_BQ=where[:, T:],
                key_position_BS=where,
                windows=(),
                dtype=torch.float32,
            )
            context = torch.cat([states[:, first:anchor] for states in said.tapped], -1)
            expected = own(own.embedded(task._backbone, block), context, where, layer_masks, layer_masks)
            torch.testing.assert_close(hidden[:, n], expected, rtol=1e-4, atol=1e-5)


def test_all_of_a_drafter_learns(tmp_path: Path) -> None:
    """Gradients reach what makes keys of the context, too: on CPUs attention reads those with the blocks' own."""
    task = DFlashTask(dflash_recipe(tmp_path))
    task.loss(np.array([0]), 0).total.backward()  # type: ignore[no-untyped-call]
    still = [name for name, p in task.trainable().items() if p.grad is None or not p.grad.any()]
    assert not still


LOSSES: dict[str, dict[str, Any]] = {
    "dflash": {"loss": "cross_entropy", "slot_decay": 7.0},
    "dspark": {"terms": {"cross_entropy": 0.1, "tv": 1.8}, "slot_decay": 4.0},
    "jetspec": {"loss": "kl", "slot_decay": 7.0},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_are_the_published_ones(variant: str, tmp_path: Path) -> None:
    """Slot by slot, from logits, as the papers' code sums them.

    DFlash: cross-entropy, exp(-(j-1)/7) at the block's slot j. DSpark: a tenth of it, and nine tenths of the sum of
    absolute differences, exp(-j/4). JetSpec: KL.
    """
    task = DFlashTask(dflash_recipe(tmp_path, model=VARIANTS[variant], objective=LOSSES[variant]))
    moved(task)
    own, config, rows = task.model, task.model.config, task._data.rows
    found = task._loss(rows, np.array([0]), step=0)
    document, position, token, answer = batch(rows, np.array([0]), task._backbone.device)
    from orthrus.train.step import row_generator

    blocks = anchors.sample(
        document,
        answer,
        blocks=10,
        block_length=config.proposals + 1,
        blind_share=0.0,
        generators=[row_generator(task._recipe.run.seed, 0, 0)],
    )
    head = task._backbone.lm_head
    with torch.no_grad():
        said = frozen.read(task._backbone, token, document, position, config.taps)
        hidden = filled(own, task._backbone, torch.cat(said.tapped, -1), token, document, position, blocks)
        total, weight, counted = 0.0, 0.0, 0
        for n in range(10):
            anchor = int(blocks.anchor_BN[0, n])
            for j in range(config.block_size):
                ahead = j + 1 if config.shift else j  # which token after the anchor the slot predicts
                text = slice(anchor + 1, anchor + ahead + 1)
                inside = anchor + ahead < token.shape[1] and bool(blocks.valid_BN[0, n])
                if (
                    ahead == 0
                    or not inside
                    or not bool((answer[0, text] & (document[0, text] == document[0, anchor])).all())
                ):
                    continue
                logits = head(hidden[0, n, j])
                if own.markov is not None:
                    logits = logits + own.markov.after_VR @ own.markov.before_VR[token[0, anchor + ahead - 1]]
                teacher = head(said.hidden_BTC[0, anchor + ahead - 1])
                p, q = teacher.softmax(-1), logits.softmax(-1)
                entropy = cross_entropy(logits, token[0, anchor + ahead])
                loss = {
                    "dflash": entropy,
                    "dspark": 0.1 * entropy + 0.9 * (p - q).abs().sum(),
                    "jetspec": (p * (p.log() - q.log())).sum(),
                }[variant]
                decay = float(np.exp(-j / 4.0)) if config.shift else float(np.exp(-(j - 1) / 7.0))
                total, weight, counted = total + decay * float(loss), weight + decay, counted + 1
    assert counted > 10
    assert float(found.total.detach()) == pytest.approx(total, rel=1e-5)
    assert float(found.weight) == pytest.approx(weight, rel=1e-6)


def by_transformers(model: PreTrainedModel, folder: Path, prompt: list[int], most: int) -> tuple[list[int], int]:
    """Decode by transformers' own loop with a drafter of its own layout; returns text and passes of the backbone."""
    passes: list[None] = []
    hook = model.register_forward_pre_hook(lambda *_: passes.append(None))
    config = GenerationConfig(max_new_tokens=most, do_sample=False, speculation_type="dflash", eos_token_id=[299])
    dflash_files.for_transformers(folder).save_pretrained(folder / "transformers")
    drafter = MuseGlimmerAssistantModel.from_pretrained(folder / "transformers", attn_implementation="sdpa")
    out = model.generate(torch.tensor([prompt]), assistant_model=drafter, generation_config=config)
    hook.remove()
    return out[0, len(prompt) :].tolist(), len(passes)


@pytest.mark.parametrize("variant", VARIANTS)
def test_thirty_steps_make_a_drafter_that_decodes(variant: str, tmp_path: Path) -> None:
    """On one prompt's answer. `load` takes it by name; four texts are plain decoding's; the answer's drafts are kept.

    And of DFlash transformers' own loop, from the same token on, makes as many passes as the engine has cycles.
    """
    recipe = dflash_recipe(
        tmp_path,
        model={**VARIANTS[variant], "taps": [0]},  # transformers' loop reads the last layer's output normed
        responses={"prompts": 1, "eval_prompts": 1, "eval_tokens": 24},
        objective={**LOSSES[variant], "blocks_per_row": 24},
        optimizer={"lr": 0.01},
        schedule={"steps": 30, "warmup_steps": 3},
        run={"batch_rows": 1, "eval_every": 1000, "checkpoint_every": 1000, "log_every": 10},
    )
    result = run(recipe)
    assert result.model is not None
    assert {"heldout/json/accepted", "heldout/json/tokens_per_cycle"} <= result.metrics.keys()
    model, _ = orthrus.load(tmp_path / "backbone", drafter=f"dflash:{result.model}", pack=False)
    drafter = attachment_of(model).drafter
    took = plan(recipe)
    assert took.shapes.trainable == sum(p.numel() for p in drafter.drafter.parameters())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone")
    rows = DFlashTask(recipe)._data.rows
    memorised = rows.token_ids[0, : int(np.argmax(rows.answer[0]))].tolist()
    prompts = [memorised, [5, 6, 7], [8], [9, 10, 11, 12, 13]]
    options = Options(max_new_tokens=20, eos_token_id=(299,))
    for name in ("full", "tree:9"):
        engine = engine_for(model, prompts, options, steps.parse(name), rows=2)
        assert engine.drafter is drafter
        done = engine.finish(prompts, options)
        for row, prompt in zip(done, prompts, strict=True):
            assert row.token_ids == reference.greedy_text(plain, prompt, 20)[: len(row.token_ids)]
            assert row.stats.draft_passes == {"dflash": row.stats.cycles}
        assert done[0].stats.accepted > 0
    if variant == "dflash":
        text, passes = by_transformers(plain, result.model, memorised, 20)
        first = [*memorised, text[0]]  # transformers draft from the first token of an answer on
        (row,) = engine_for(model, [first], options, steps.parse("full"), rows=1).finish(
            [first], Options(max_new_tokens=19, eos_token_id=(299,))
        )
        assert text[1:] == row.token_ids
        assert passes == 1 + row.stats.cycles
        assert row.stats.cycles < 19


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    """Stopped after two of four steps and taken up again: bit for bit as if never stopped."""
    short = {"schedule": {"steps": 4, "warmup_steps": 1}, "run": {"eval_every": 1000, "checkpoint_every": 2}}
    whole = dflash_recipe(tmp_path, **short, data={"folder": str(tmp_path / "data")})
    parts = whole.model_copy(update={"run": whole.run.model_copy(update={"output": str(tmp_path / "parts")})})
    run(whole)

    class Stopped(Exception):
        pass

    class Stopping(DFlashTask):
        def loss(self, rows: Any, step: int) -> Any:
            if step == 3:
                raise Stopped
            return super().loss(rows, step)

    from orthrus.train.loop import train

    with pytest.raises(Stopped):
        train(Stopping(parts), parts)
    run(parts)
    left, right = ((Path(each.run.output) / "model/model.safetensors").read_bytes() for each in (whole, parts))
    assert left == right
