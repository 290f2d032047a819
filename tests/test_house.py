"""Rules that keep the house small: sizes, one noun a figure, records that are cited."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "orthrus"
MODULES = sorted(SOURCE.rglob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(SOURCE.glob("zoo/*/README.md"))]
LONGEST_FILE, LONGEST_CLASS, LONGEST_README_SENTENCE = 350, 250, 40
in_the_checkout = pytest.mark.skipif(not MODULES or not (ROOT / "results").is_dir(), reason="needs a whole checkout")


def lengths_of_classes(path: Path) -> dict[str, int]:
    """Lines of each class of a module, decorators left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {n.name: (n.end_lineno or 0) - n.lineno + 1 for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}


@in_the_checkout
def test_files_and_classes_stay_readable_in_a_sitting() -> None:
    """At most 350 lines a file and 250 a class; kernels may be longer."""
    modules = [path for path in MODULES if "kernels" not in path.parts]
    assert modules
    files = {str(p.relative_to(SOURCE)): len(p.read_text(encoding="utf-8").splitlines()) for p in modules}
    classes = {f"{p.relative_to(SOURCE)}:{n}": k for p in modules for n, k in lengths_of_classes(p).items()}
    assert {name: lines for name, lines in files.items() if lines > LONGEST_FILE} == {}
    assert {name: lines for name, lines in classes.items() if lines > LONGEST_CLASS} == {}


@in_the_checkout
def test_results_are_cited_and_citations_lead_to_results() -> None:
    """README, docs and model cards cite every file of results/, and no file that is not there."""
    cited = {name for page in PAGES for name in re.findall(r"results/([\w.-]+\.jsonl)", page.read_text("utf-8"))}
    kept = {path.name for path in (ROOT / "results").iterdir()}
    assert (sorted(cited - kept), sorted(kept - cited)) == ([], [])


@in_the_checkout
def test_sentences_of_the_readme_are_short() -> None:
    """Forty words at most; tables, code and lists count line by line."""
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    sentences = [s for line in text.splitlines() for s in re.split(r"(?<=[.!?:;])\s", line) if "|" not in s]
    assert [s for s in sentences if len(s.split()) > LONGEST_README_SENTENCE] == []
