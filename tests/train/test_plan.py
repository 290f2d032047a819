"""What a plan says, against models that are really made and runs that really happened."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import AutoConfig

from orthrus.cli import main
from orthrus.errors import CheckpointError
from orthrus.model.attach import attach
from orthrus.train.config import load_recipe, recipe_from_mapping
from orthrus.train.plan import plan
from orthrus.train.prepare import made_from
from orthrus.train.sections import ViewRecipe
from orthrus.train.shapes import shapes_of
from orthrus.train.work import Answers, answers_of
from tests.families import FAMILIES, tiny
from tests.train.tiny import view_recipe

ROOT = Path(__file__).parents[2]
RACES: dict[str, tuple[tuple[str, ...], dict[str, Any], Answers]] = {
    # Recipes, the shape of a backbone that is not bundled, and what the manifests of the races' rows said.
    "peers": (
        (
            "view", "view-ours", "eagle3", "dflash", "dflash2", "dspark", "jetspec", "draft",
            "blockdiff", "blockdiff32", "sdar", "dream",
        ),
        {},
        Answers(share=0.557, tokens=1_112),
    ),
    "peers/smollm2": (
        ("view", "view-ours", "eagle3", "dflash", "dspark", "jetspec", "draft"),
        {
            "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
            "intermediate_size": 1536, "vocab_size": 49_152, "tie_word_embeddings": True,
        },
        Answers(share=0.592, tokens=14_901),
    ),
}  # fmt: skip
THREAD = "one thread of an AMD EPYC"
PUBLISHED = {
    # Hugging Face's config.json of Qwen/Qwen3-NAME, in short.
    "0.6B": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 3072},
    "8B": {
        "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 12288,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


def config_in(folder: Path, family: str, **values: Any) -> Path:
    """A folder with a configuration and no weights."""
    AutoConfig.for_model(family, **values).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3_text", "qwen3_moe", "qwen3_5_text"])
def test_shapes_are_those_of_the_model(family: str, tmp_path: Path) -> None:
    """Parameters in all, of the twin, and per token: all matrices, or the chosen experts' share of theirs."""
    model = tiny(family)
    model.config.save_pretrained(tmp_path)
    shapes = shapes_of(view_recipe(tmp_path, tmp_path))
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    linear -= model.get_output_embeddings().weight.numel()
    experts = [p for name, p in model.named_parameters() if p.ndim == 3 and "conv1d" not in name]
    assert bool(experts) == (family == "qwen3_moe")
    routers = sum(p.numel() for n, p in model.named_parameters() if experts and n.endswith("mlp.gate.weight"))
    chosen = int(FAMILIES.get(family, {}).get("num_experts_per_tok", 1))  # type: ignore[call-overload]
    assert shapes.active == linear + routers + sum(chosen * p[0].numel() for p in experts)
    attach(model)
    assert shapes.total == sum(p.numel() for p in model.parameters())
    assert shapes.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["train-nano.jsonl", "train-nano-backbone.jsonl", "train-nano-backbone-start.jsonl"])
def test_nanos_steps_took_what_the_plan_says(name: str) -> None:
    """The median step of each committed run lies within a factor of two of the plan, on a busy machine."""
    lines = [json.loads(line) for line in (ROOT / "results" / name).read_text().splitlines()]
    start = lines[0]
    tables = start["recipe"]
    if tables["kind"] == "view":
        tables = {**tables, "model": {**tables["model"], "backbone": "nano"}}
        tables["data"].pop("tokens", None)  # asked of every recipe then
    took = statistics.median(line["step_seconds"] for line in lines if line["event"] == "step")
    devices = start["provenance"].get("processes", 1) * start["provenance"]["threads"]
    planned = plan(recipe_from_mapping(tables), devices=devices).seconds[THREAD]
    assert 1 / 2 < planned / took < 2


def test_the_papers_recipe_reads_what_the_paper_read(tmp_path: Path) -> None:
    """Two epochs of 0.96 billion tokens, and about 242 million blocks over them; a sixth of the model is trained."""
    qwen = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True}
    backbone = config_in(tmp_path, "qwen3", **{**qwen, **PUBLISHED["8B"]})
    recipe = load_recipe(ROOT / "recipes" / "paper" / "qwen3-8b.toml", [f"model.backbone={backbone}"])
    made = plan(recipe, devices=8)
    assert made.tokens == pytest.approx(2 * 0.9666e9, rel=1e-3)
    assert made.drafted / 32 == pytest.approx(241.6e6, rel=1e-3)
    assert made.shapes.total - made.shapes.trainable == pytest.approx(8.19e9, rel=1e-2)
    assert 0.14 < made.shapes.trainable / made.shapes.total < 0.17
    assert 5 < made.hours["H200"] < 48, "the authors took less than 24 hours on eight"


def test_a_hybrid_is_planned_by_its_layers(tmp_path: Path) -> None:
    """Qwen3.5-0.8B: a third is trained; attention is priced in its six layers alone, states and keys are both kept."""
    shape: dict[str, Any] = {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 8, "num_key_value_heads": 2,
        "intermediate_size": 3584, "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 16,
        "tie_word_embeddings": True,
    }  # fmt: skip
    path = ROOT / "recipes" / "qwen3.5-0.8b.toml"
    place = f"model.backbone={config_in(tmp_path, 'qwen3_5_text', **shape)}"
    made = plan(load_recipe(path, [place]), devices=8)
    backbone, correction = made.shapes.total - made.shapes.trainable, 2 * 64 * made.shapes.vocabulary
    assert backbone == pytest.approx(0.75e9, rel=0.01)
    assert (made.shapes.trainable - correction) / backbone == pytest.approx(0.31, abs=0.01)
    assert (made.shapes.layers, made.shapes.recurrent) == (24, 18)
    keys, chunks = 6 * 2 * 2 * 256 * 2, 18 * 4 * (6144 + 2 * 2048 + 16 * 128 * 128 / 64)
    assert made.memory["teacher_keys"] == 2048 * (keys + chunks)
    assert 0.5 < made.hours["H200"] < 24


def test_memory_falls_with_smaller_parts_and_recomputation(tmp_path: Path) -> None:
    """What a device holds per row shrinks with accumulation, devices and checkpointing; weights do not."""
    backbone = config_in(tmp_path, "qwen3", num_key_value_heads=8, vocab_size=151936, **PUBLISHED["0.6B"])
    path, place = ROOT / "recipes" / "paper" / "qwen3-0.6b.toml", f"model.backbone={backbone}"
    whole = plan(load_recipe(path, [place, "run.grad_accumulation=1"])).memory
    parts = plan(load_recipe(path, [place]), devices=8).memory
    again = plan(load_recipe(path, [place, "model.gradient_checkpointing=true"]), devices=8).memory
    assert whole["activations"] == pytest.approx(128 * parts["activations"])
    assert again["activations"] < parts["activations"] / 5
    assert whole["weights"] == parts["weights"] == again["weights"]


def test_sharding_divides_all_but_the_head(tmp_path: Path) -> None:
    """On eight devices weights, gradients and optimizer are an eighth, but for the head; one device has nobody."""
    backbone = config_in(tmp_path, "qwen3", num_key_value_heads=8, vocab_size=151936, **PUBLISHED["8B"])
    path, place = ROOT / "recipes" / "paper" / "qwen3-8b.toml", f"model.backbone={backbone}"
    recipe = load_recipe(path, [place, "run.sharding=fsdp2"])
    whole, alone, eight = plan(load_recipe(path, [place]), devices=8), plan(recipe), plan(recipe, devices=8)
    head = 4 * eight.shapes.head
    assert eight.memory["weights"] - head == pytest.approx((whole.memory["weights"] - head) / 8)
    for part in ("gradients", "optimizer"):
        assert eight.memory[part] == pytest.approx(whole.memory[part] / 8)
    assert alone.memory["weights"] == whole.memory["weights"]
    assert sum(eight.memory.values()) < sum(whole.memory.values()) / 2


def test_the_command_prints_a_table_or_json_and_trains_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """No output folder appears; JSON is one object; --json and --devices without --plan are refused."""
    arguments = ["train", str(ROOT / "recipes" / "nano" / "11-view-last.toml"), "--set", "model.backbone=nano"]
    arguments += ["--set", f"run.output={tmp_path / 'run'}"]
    assert main([*arguments, "--plan"]) == 0
    assert "memory a device" in capsys.readouterr().out
    assert main([*arguments, "--plan", "--json", "--devices", "2"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["devices"], printed["trainable"]) == (2, 1_442_560)
    assert main([*arguments, "--json"]) == main([*arguments, "--devices", "1"]) == 2
    assert "--devices is about a plan: give --plan too" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_backbone_without_a_configuration_is_named(tmp_path: Path) -> None:
    """An empty folder cannot be planned for."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty: a backbone's config\.json is required"):
        plan(view_recipe(tmp_path / "empty", tmp_path))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama-3.2-1b", "template"), ("gemma-3-1b", "template"), ("qwen3-30b-a3b", "off"), ("paper/qwen3-4b", "off")],
)
def test_other_backbones_are_a_few_lines_away(name: str, kind: str) -> None:
    """Each differs from the smallest recipe of its kind in its backbone, its folder and little else."""
    base = load_recipe(ROOT / "recipes" / ("paper/qwen3-0.6b.toml" if "paper" in name else "qwen3-0.6b.toml"))
    recipe = load_recipe(ROOT / "recipes" / f"{name}.toml")
    assert isinstance(recipe, ViewRecipe)
    assert isinstance(base, ViewRecipe)
    assert (recipe.objective, recipe.optimizer, recipe.schedule) == (base.objective, base.optimizer, base.schedule)
    assert (recipe.data, recipe.answers.thinking) == (base.data, kind)
    assert recipe.model.backbone != base.model.backbone


def test_what_won_stands_on_the_paper_s_recipe() -> None:
    """The same data and budget; only the objective's weights, masked anchors and the correction are others."""
    paper, ours = (load_recipe(ROOT / "recipes" / f"{name}.toml") for name in ("paper/qwen3-0.6b", "qwen3-0.6b"))
    assert isinstance(paper, ViewRecipe)
    assert isinstance(ours, ViewRecipe)
    assert (ours.data, ours.optimizer, ours.schedule) == (paper.data, paper.optimizer, paper.schedule)
    assert (paper.model.markov_rank, ours.model.markov_rank) == (0, 64)
    changed = {name for name, value in ours.objective if value != getattr(paper.objective, name)}
    assert changed == {"slot_decay", "block_lengths", "blind_anchor_share"}


@pytest.mark.parametrize("race", RACES)
def test_peers_take_the_view_s_operations_within_five_percent(race: str, tmp_path: Path) -> None:
    """Recipes of one race: the same data, answers and batch, and as much to compute in all."""
    names, shape, answers = RACES[race]
    place = [f"model.backbone={config_in(tmp_path, 'llama', **shape)}"] if shape else []
    recipes = [load_recipe(ROOT / "recipes" / race / f"{name}.toml", place) for name in names]
    totals = [plan(recipe, answers=answers).operations * recipe.schedule.steps for recipe in recipes]
    assert max(totals) < 1.05 * min(totals)
    shared = [(r.model_dump(include={"data", "answers", "responses"}), r.run.batch_rows) for r in recipes]
    assert all(one == shared[0] for one in shared)


def test_a_plan_counts_what_packed_rows_say_of_their_answers(tmp_path: Path) -> None:
    """Fewer positions to score and fewer tokens in the softmax cost less; without rows the most is assumed."""
    recipe = load_recipe(ROOT / "recipes/peers/smollm2/eagle3.toml", [f"data.folder={tmp_path}", "model.backbone=nano"])
    assert answers_of(recipe) == Answers()
    (tmp_path / "train").mkdir()
    said = {"rows": 4, "row_tokens": 100, "answer_tokens": 100, "tokens_distinct": 70, "about": made_from(recipe, None)}
    (tmp_path / "train" / "manifest.json").write_text(json.dumps(said))
    assert answers_of(recipe) == Answers(share=0.25, tokens=70)
    scored = 2 * 5 * recipe.data.row_tokens * recipe.objective.steps * shapes_of(recipe).hidden
    saved = plan(recipe).operations - plan(recipe, answers=answers_of(recipe)).operations
    assert saved == pytest.approx(scored * (shapes_of(recipe).vocabulary - 0.25 * 70))


@pytest.mark.parametrize("change", ["data.row_tokens=256", "responses.max_new_tokens=7", "answers.thinking=off"])
def test_rows_for_another_recipe_say_nothing(change: str, tmp_path: Path) -> None:
    """They will be packed again."""
    place = [f"data.folder={tmp_path}", "model.backbone=nano"]
    before, recipe = (
        load_recipe(ROOT / "recipes/peers/smollm2/eagle3.toml", [*place, *more]) for more in ([], [change])
    )
    (tmp_path / "train").mkdir()
    said = {"rows": 4, "row_tokens": 100, "answer_tokens": 100, "about": made_from(before, None)}
    (tmp_path / "train" / "manifest.json").write_text(json.dumps(said))
    assert answers_of(before) == Answers(share=0.25)
    assert answers_of(recipe) == Answers()


def test_a_view_of_the_upper_layers_costs_less(tmp_path: Path) -> None:
    """No gradient goes below the first twin, and a causal block is computed without its last slot."""
    whole = view_recipe("nano", tmp_path)
    model = whole.model.model_copy(update={"layers": "last:2"})
    upper = whole.model_copy(update={"model": model})
    shapes, slots = shapes_of(upper), whole.objective.blocks_per_row * whole.model.block_size
    assert (shapes_of(whole).upper, shapes.upper) == (6, 2)
    assert shapes.trainable * 6 == shapes_of(whole).trainable * 2
    spared = plan(whole).operations - plan(upper).operations
    lower = 4 / 6 * whole.run.batch_rows * slots
    assert spared > lower * 2 * shapes.active  # and attention
    causal = whole.model.model_copy(update={"block_attention": "causal"})
    assert plan(whole.model_copy(update={"model": causal})).operations < plan(whole).operations
