"""Recipes: read strictly, inherited, overridden, compared, and refused with words that help."""

from pathlib import Path
from typing import Any

import pytest

from orthrus.errors import ConfigError
from orthrus.kernels import native
from orthrus.train.config import KINDS, changed_keys, load_recipe, recipe_from_mapping
from orthrus.train.corpus import data_folder
from orthrus.train.sections import BackboneRecipe
from orthrus.train.sources import JsonlSource, SyntheticSource
from orthrus.train.sweep import load_sweep, runs_of
from tests.train.tiny import tiny_recipe, view_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
NANO = RECIPES / "nano/01-backbone-start.toml"


def refusal(*overrides: str) -> str:
    """What loading the nano backbone with overrides says when it is refused."""
    with pytest.raises(ConfigError) as caught:
        load_recipe(NANO, overrides)
    return str(caught.value)


SWEEPS = set(RECIPES.rglob("*.sweep.toml"))


@pytest.mark.parametrize("path", sorted(set(RECIPES.rglob("*.toml")) - SWEEPS), ids=lambda path: path.stem)
def test_committed_recipes_load(path: Path) -> None:
    assert load_recipe(path).kind in KINDS


def test_sizes_of_corpora_are_asked_of_backbones_alone(tmp_path: Path) -> None:
    tables = view_recipe(tmp_path, tmp_path).model_dump(mode="json", exclude_none=True)
    tables["data"]["tokens"] = 1000
    with pytest.raises(ConfigError, match=r"data\.tokens: unknown key"):
        recipe_from_mapping(tables)


@pytest.mark.parametrize("path", sorted(SWEEPS), ids=lambda path: path.stem)
def test_every_variant_of_committed_sweeps_is_a_recipe(path: Path) -> None:
    sweep = load_sweep(path)
    assert len(list(runs_of(sweep, path))) == len(sweep.seeds) * len(sweep.variants)


def test_overrides_are_toml_values_and_bare_strings_are_strings() -> None:
    recipe = load_recipe(
        NANO,
        [
            "optimizer.lr=1e-4",
            "schedule.kind=linear",
            'run.output="a b"',
            "optimizer.betas=[0.8, 0.9]",
            "model.tie_word_embeddings = false",
        ],
    )
    assert isinstance(recipe, BackboneRecipe)
    assert recipe.optimizer.lr == 1e-4
    assert recipe.schedule.kind == "linear"
    assert recipe.run.output == "a b"
    assert recipe.optimizer.betas == (0.8, 0.9)
    assert recipe.model.tie_word_embeddings is False


@pytest.mark.parametrize(
    ("overrides", "multiplies", "warned"),
    [
        (["run.dtype=bfloat16"], False, True),
        (["run.dtype=bfloat16"], True, False),
        (["run.dtype=bfloat16", "run.device=cuda"], False, False),
        (["run.dtype=float32"], False, False),
    ],
)
def test_bfloat16_on_a_cpu_that_does_not_multiply_in_it_is_warned_of(
    overrides: list[str],
    multiplies: bool,
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    """And honoured."""
    monkeypatch.setattr(native, "multiplies", lambda _: multiplies)
    recipe = load_recipe(NANO, overrides)
    assert recipe.run.dtype == overrides[0].removeprefix("run.dtype=")
    assert [("--set run.dtype=float32" in str(one.message)) for one in recwarn] == [True] * warned


def test_an_integer_is_a_good_float() -> None:
    assert load_recipe(NANO, ["optimizer.clip=1"]).optimizer.clip == 1.0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.hiden_size=3", "model.hiden_size: unknown key; the nearest valid key is model.hidden_size"),
        ("optimzer.lr=3", "optimzer: unknown key; the nearest valid key is optimizer"),
        ("run.colour.red=1", "run.colour: unknown key"),
        ("model.hidden_size=2.5", "model.hidden_size: Input should be a valid integer"),
        ("model.hidden_size=2.5", "found 2.5 (float)"),
        ("model.hidden_size='256'", "found '256' (str)"),
        ("run.batch_rows=true", "found True (bool)"),
        ("optimizer.lr=0", "optimizer.lr: Input should be greater than 0; found 0"),
        ("optimizer.lr=inf", "optimizer.lr: Input should be a finite number"),
        ("optimizer.name=sgd", "optimizer.name: Input should be 'muon+adamw' or 'adamw'; found 'sgd'"),
        ("optimizer.name=adamw", "optimizer: muon_lr is required with name = 'muon+adamw'"),
        ("run.batch_rows=3", "  run: batch_rows (3) must be a multiple of grad_accumulation (2)"),
        ("data.row_tokens=9000", "data.row_tokens must be at most model.max_position_embeddings (8192), found 9000"),
        (
            "kind=sideways",
            "kind: expected one of 'backbone', 'view', 'eagle3', 'draft', 'blocks', 'dflash', found 'sideways'",
        ),
        ("model=3", "model: "),
        ("data.sources=[]", "data.sources: List should have at least 1 item"),
        ("data.sources=[{kind='jsonl', weight=1.0}]", "data.sources.0.path: required, but not given"),
        (
            "data.sources=[{kind='synthetic', domian='maths', weight=1.0}]",
            "data.sources.0.domian: unknown key; the nearest valid key is data.sources.domain",
        ),
        ("model.hidden_size", "expected section.key=value"),
        (".x=1", "expected section.key=value"),
    ],
)
def test_refusals_name_key_value_and_remedy(override: str, words: str) -> None:
    assert words in refusal(override)


@pytest.mark.parametrize(
    ("shared", "one", "other", "words"),
    [
        (
            {"kind": "jsonl"},
            {"path": "a/train.jsonl"},
            {"path": "b/train.jsonl.gz"},
            "'train' for a/train.* b/train",
        ),
        ({"kind": "jsonl"}, {"path": "wiki.en.jsonl"}, {"path": "wiki.de.jsonl"}, "'wiki' for wiki.en.* wiki.de.jsonl"),
        (
            {"kind": "dataset", "name": "a/x", "columns": {"text": "text"}},
            {"config": "c"},
            {"config": "d"},
            r"'x-train' for a/x \(c, train\) .* a/x \(d, train\)",
        ),
        ({"kind": "synthetic", "domain": "maths"}, {}, {}, r"'maths' for maths \(sources.0\) and maths \(sources.1\)"),
    ],
)
def test_held_out_sets_of_one_name_are_refused(
    shared: dict[str, Any], one: dict[str, Any], other: dict[str, Any], words: str
) -> None:
    """Both are named: the second would be evaluated on the first one's documents. A set that is not there is none."""
    first, second = ({"weight": 1.0, "heldout": 2, **shared, **keys} for keys in (one, other))
    with pytest.raises(ConfigError, match=rf"data: .* must have different names, found {words}"):
        tiny_recipe(Path("run"), data={"sources": [first, second]})
    assert tiny_recipe(Path("run"), data={"sources": [first, second | {"heldout": 0}]})


def test_blocks_that_are_never_decoded_are_refused() -> None:
    """A view decodes blocks of `model.block_size` at most."""
    words = r"block_lengths must be at most model\.block_size \(6\), found \[6, 8\]"
    with pytest.raises(ConfigError, match=words):
        view_recipe(Path("model"), Path("run"), objective={"block_lengths": [6, 8]})


def test_all_faults_are_named_at_once() -> None:
    message = refusal("model.hiden_size=3", "run.seed=no")
    assert "model.hiden_size" in message
    assert "run.seed" in message


def test_extends_merges_tables_deeply_and_replaces_lists(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    base = NANO.read_text(encoding="utf-8")
    (tmp_path / "base.toml").write_text(base, encoding="utf-8")
    (tmp_path / "deep" / "child.toml").write_text(
        'extends = "../base.toml"\n[run]\nseed = 9\n'
        '[[data.sources]]\nkind = "synthetic"\ndomain = "code"\nweight = 1\n',
        encoding="utf-8",
    )
    parent, child = load_recipe(tmp_path / "base.toml"), load_recipe(tmp_path / "deep" / "child.toml")
    assert child.run == parent.run.model_copy(update={"seed": 9})
    assert child.optimizer == parent.optimizer
    assert child.data.sources == [SyntheticSource(kind="synthetic", domain="code", weight=1.0)]


def test_extending_in_a_circle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('extends = "b.toml"', encoding="utf-8")
    (tmp_path / "b.toml").write_text('extends = "a.toml"', encoding="utf-8")
    with pytest.raises(ConfigError, match="circle"):
        load_recipe(tmp_path / "a.toml")


@pytest.mark.parametrize(("content", "words"), [("kind = ", "not valid TOML"), ("extends = 3", "expected a path")])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=words) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)
    with pytest.raises(ConfigError, match=r"absent\.toml: a recipe file is required"):
        load_recipe(tmp_path / "absent.toml")


def test_recipes_are_frozen() -> None:
    recipe = load_recipe(NANO)
    with pytest.raises(ValueError, match="frozen"):
        recipe.run.seed = 3  # type: ignore[misc]


def test_changed_keys_are_dotted_and_complete() -> None:
    before = load_recipe(NANO).model_dump(mode="json")
    after = load_recipe(NANO, ["run.seed=5", "optimizer.lr=1.0"]).model_dump(mode="json")
    assert changed_keys(before, before) == []
    assert changed_keys(before, after) == ["optimizer.lr", "run.seed"]
    assert changed_keys({}, {"a": {"b": 1}}) == ["a.b"]


def test_sources_are_told_apart_by_kind() -> None:
    recipe = load_recipe(NANO)
    assert {type(source) for source in recipe.data.sources} == {SyntheticSource, JsonlSource}


@pytest.mark.parametrize("key", ["run.output", "data.folder"])
def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path, key: str) -> None:
    file = tmp_path / "file"
    file.touch()
    recipe = load_recipe(NANO, [f"{key}={file}"])
    with pytest.raises(ConfigError, match=rf"{key} must be a folder, found the file {file}"):
        data_folder(recipe)
    assert file.is_file()
