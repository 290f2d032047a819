"""vLLM's classes step aside for Orthrus checkpoints alone, whenever they come to be imported."""

import subprocess
import sys
from importlib import import_module, invalidate_caches
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from orthrus.errors import ConfigError
from orthrus.integrations.vllm import ARCHITECTURE
from orthrus.integrations.vllm.dispatch import step_aside, when_imported


def configuration(target: str, draft: str) -> Any:
    """What the dispatch reads of a `VllmConfig`."""

    def model(name: str) -> SimpleNamespace:
        return SimpleNamespace(model=name, architectures=[name])

    spec = SimpleNamespace(draft_model_config=model(draft))
    return SimpleNamespace(model_config=model(target), speculative_config=spec)


class Stock:
    """A drafter of vLLM's."""

    def __init__(self, config: Any, device: str, runner: Any = None) -> None:
        self.seen = (config, device, runner)


class Other:
    """A drafter that is none of vLLM's."""

    def __init__(self, config: Any, device: str) -> None:
        self.seen = (config, device)


@pytest.fixture
def stock() -> type[Stock]:
    """A class that no other test has changed."""
    return type("Stock", (), {"__init__": Stock.__init__})


def test_other_models_get_the_stock_object_itself(stock: type[Stock]) -> None:
    step_aside(stock, lambda: Other)
    config = configuration("Llama", "Llama")
    made = stock(config, "cpu", runner=1)
    assert type(made) is stock
    assert made.seen == (config, "cpu", 1)


def test_an_orthrus_checkpoint_gets_its_drafter_built_once(stock: type[Stock]) -> None:
    """Also where ours is a subclass of the stock class, whose constructor Python would run again."""
    built = []

    class Sub(stock):  # type: ignore[misc,valid-type]
        def __init__(self, config: Any, device: str, runner: Any = None) -> None:
            built.append(device)
            super().__init__(config, device, runner)

    step_aside(stock, lambda: Sub)
    made = stock(configuration(ARCHITECTURE, ARCHITECTURE), "cpu")
    assert type(made) is Sub
    assert built == ["cpu"]


def test_a_drafter_that_is_no_stock_class_is_returned_as_it_is(stock: type[Stock]) -> None:
    step_aside(stock, lambda: Other)
    config = configuration(ARCHITECTURE, ARCHITECTURE)
    made: Any = stock(config, "cpu")
    assert type(made) is Other
    assert made.seen == (config, "cpu")


def test_an_orthrus_draft_for_another_target_is_refused(stock: type[Stock]) -> None:
    step_aside(stock, lambda: Other)
    with pytest.raises(ConfigError, match="drafts for itself only, found Llama as its target"):
        stock(configuration("Llama", ARCHITECTURE), "cpu")


def test_installing_twice_changes_nothing_and_a_missing_class_is_let_be(stock: type[Stock]) -> None:
    step_aside(stock, lambda: Other)
    first = stock.__new__
    step_aside(stock, lambda: Other)
    assert stock.__new__ is first
    step_aside(None, lambda: Other)


def test_a_module_is_seen_right_after_its_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anyone can take a name out of it, once, with its own loader in place; other modules load as ever."""
    (tmp_path / "late_module.py").write_text("NAME = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    before, seen = list(sys.meta_path), []

    def rename(module: ModuleType) -> None:
        seen.append(module.NAME)
        module.NAME = 2

    when_imported("late_module", rename)
    assert seen == []
    module = import_module("late_module")
    monkeypatch.setitem(sys.modules, "late_module", module)
    assert (seen, module.NAME) == ([1], 2)
    assert type(module.__loader__).__name__ == type(module.__spec__.loader).__name__ == "SourceFileLoader"
    assert sys.meta_path == before
    when_imported("late_module", rename)
    assert seen == [1, 2]


def test_hooks_wait_for_an_import_that_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks for the module before, as packages do, or fails to import it; each hook of several runs once."""
    (source := tmp_path / "sought_module.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    before, seen = list(sys.meta_path), []
    for name in ("first", "second"):
        when_imported("sought_module", lambda _, name=name: seen.append(name))
    assert find_spec("sought_module") is not None
    with pytest.raises(ZeroDivisionError):
        import_module("sought_module")
    source.write_text("NAME = 1\n")
    invalidate_caches()
    assert find_spec("sought_module") is not None
    monkeypatch.setitem(sys.modules, "sought_module", import_module("sought_module"))
    assert seen == ["first", "second"]
    assert sys.meta_path == before


def test_importing_the_plugin_loads_neither_torch_nor_vllm() -> None:
    """vLLM imports it in every process, for every model."""
    code = (
        "import sys, orthrus.integrations.vllm.dispatch, orthrus.integrations.vllm.hook\n"
        "print(sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
