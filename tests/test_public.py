"""The package's front door: what it names is there, and looking at it costs nothing."""

import subprocess
import sys

import pytest

import orthrus


def test_all_is_what_can_be_imported() -> None:
    """Every public name resolves, `dir` lists it, and the stubs for type checkers name the same."""
    for name in orthrus.__all__:
        assert getattr(orthrus, name).__module__.startswith("orthrus.")
    assert sorted([*orthrus.__all__, "__version__"]) == dir(orthrus)
    assert set(orthrus.__all__) == set(orthrus._HOMES)
    assert orthrus.__all__ == sorted(orthrus.__all__)


def test_unknown_names_are_attribute_errors() -> None:
    """As of any module."""
    with pytest.raises(AttributeError, match="module 'orthrus' has no attribute 'nothing'"):
        orthrus.nothing  # noqa: B018


@pytest.mark.parametrize(
    "statement", ["import orthrus", "import orthrus, orthrus.errors; dir(orthrus); orthrus.__version__"]
)
def test_importing_loads_no_torch(statement: str) -> None:
    """Nor transformers, nor numpy: a fresh interpreter shows it."""
    check = f"{statement}; import sys; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_configuration_loads_no_torch() -> None:
    """The configuration is data; only models need torch."""
    check = "import orthrus; orthrus.OrthrusConfig(block_size=8); import sys; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
