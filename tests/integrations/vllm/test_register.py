"""Registration adds one architecture to vLLM, and never stands in another model's way."""

import sys
from types import ModuleType
from typing import Any

import pytest

from orthrus.integrations.vllm import ARCHITECTURE, dispatch, register
from orthrus.integrations.vllm.hook import OrthrusConfigHook


class Registry:
    """What is called of vLLM's model registry."""

    def __init__(self) -> None:
        self.models: dict[str, str] = {}

    def register_model(self, name: str, place: str) -> None:
        self.models[name] = place


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The two modules of vLLM that registration imports, as stand-ins; no stock class is watched for."""
    names = ("vllm", "vllm.model_executor", "vllm.model_executor.models", "vllm.model_executor.models.config")
    made: dict[str, Any] = {name: ModuleType(name) for name in names}
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(dispatch, "install", lambda: None)
    return made


def test_one_architecture_is_added_lazily_and_repeatedly(modules: dict[str, Any]) -> None:
    registry, hooks = Registry(), {"Other": object()}
    modules["vllm.model_executor.models"].ModelRegistry = registry
    modules["vllm.model_executor.models.config"].MODELS_CONFIG_MAP = hooks
    other = hooks["Other"]
    register()
    register()
    assert registry.models == {ARCHITECTURE: "orthrus.integrations.vllm.model:OrthrusForCausalLM"}
    assert hooks == {"Other": other, ARCHITECTURE: OrthrusConfigHook}


def test_a_vllm_without_these_names_is_warned_of_and_starts(
    modules: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    modules["vllm.model_executor.models"].ModelRegistry = registry = Registry()
    register()
    assert registry.models == {}
    assert "This vLLM cannot serve Orthrus checkpoints: cannot import name 'MODELS_CONFIG_MAP'" in caplog.text
