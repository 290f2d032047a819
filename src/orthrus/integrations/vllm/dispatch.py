"""How vLLM comes to build our drafters: its own classes for `draft_model` step aside for Orthrus checkpoints.

The stock class of each runner is given a `__new__`, once its module has been imported for another reason. For every
other draft model that `__new__` makes exactly the stock object.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pkgutil import resolve_name
from types import ModuleType
from typing import Any

from orthrus.errors import ConfigError
from orthrus.integrations.vllm import ARCHITECTURE

V1 = ("vllm.v1.spec_decode.draft_model", "DraftModelProposer", "orthrus.integrations.vllm.v1:OrthrusProposer")
V2 = (
    "vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator",
    "StandaloneARSpeculator",
    "orthrus.integrations.vllm.v2:OrthrusSpeculator",
)
"""Module and class of each runner's stock drafter, and the class that stands in for it."""


def install() -> None:
    """Arrange for both stock classes to step aside; repeated calls change nothing."""
    when_imported(V1[0], lambda module: step_aside(getattr(module, V1[1], None), partial(resolve_name, V1[2])))
    when_imported(V2[0], lambda module: step_aside(getattr(module, V2[1], None), partial(resolve_name, V2[2])))


def step_aside(stock: type | None, ours: Callable[[], type[Any]]) -> None:
    """Let `stock(vllm_config, …)` build an object of `ours()` where target and draft are an Orthrus checkpoint.

    A class that is not there belongs to a version of vLLM that the configuration hook refuses.
    """
    if stock is None or "__new__" in vars(stock):
        return

    def __new__(cls: type, vllm_config: Any, *args: Any, **kwargs: Any) -> object:
        if cls is not stock or not is_ours(vllm_config):
            return object.__new__(cls)
        made = ours()
        # Python itself calls the constructor of a subclass of `stock`, and of nothing else.
        return object.__new__(made) if issubclass(made, stock) else made(vllm_config, *args, **kwargs)

    setattr(stock, "__new__", __new__)  # noqa: B010 (a type checker sees an override here)


def is_ours(vllm_config: Any) -> bool:
    """Tell whether the draft model is an Orthrus checkpoint.

    Raises ConfigError: it is, but the target is another model.
    """
    if ARCHITECTURE not in vllm_config.speculative_config.draft_model_config.architectures:
        return False
    if ARCHITECTURE not in vllm_config.model_config.architectures:
        raise ConfigError(
            f"an Orthrus checkpoint drafts for itself only, found {vllm_config.model_config.model} as its target: "
            f"serve {vllm_config.speculative_config.draft_model_config.model}, or name another draft model"
        )
    return True


def when_imported(name: str, action: Callable[[ModuleType], None]) -> None:
    """Call `action(module)` right after a module has been imported; at once if it has been already."""
    if name in sys.modules:
        action(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, action))


class _Finder(MetaPathFinder):
    """Find one module as everyone else would, and run an action behind its loader, until it has been imported."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.action = action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name or self not in sys.meta_path:
            return None
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]
        spec = next((found for other in others if (found := other.find_spec(fullname, path, target))), None)
        if spec is not None and (loader := spec.loader) is not None:
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                loader.exec_module = execute  # type: ignore[method-assign]
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                self.action(module)

            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
