"""Views in repositories that transformers opens by itself: what the Python files beside them call."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3ForCausalLM, StoppingCriteriaList, StopStringCriteria

from orthrus.checkpoints.load import is_adapter, load_official, locate, put_on, ready
from orthrus.errors import CheckpointError
from orthrus.integrations.hf import hf_generate
from orthrus.model.attach import evaluating, is_attached


def generate(model: PreTrainedModel, repository: str | Path | None, *inputs: Any, **arguments: Any) -> Any:
    """Do what `model.generate` does, drafting with a view.

    `repository` is where the view's adapter is, None for a model that has one; a plain backbone keeps it for the next
    call. Arguments are `generate`'s, and `mode`, `plan` and `exact` as `orthrus.generate` takes them.

    Raises:
        CheckpointError: the repository holds no adapter, or one of another backbone.
        ConfigError: an option that is not honoured.
    """
    if not is_attached(model):
        if repository is None:
            raise CheckpointError("this model has no view any more: load it again")
        home = locate(repository)
        if not is_adapter(home):
            raise CheckpointError(
                f"{repository} must hold an adapter, found none: open the official layout with "
                "AutoModelForCausalLM.from_pretrained(…, trust_remote_code=True)"
            )
        with evaluating(model):
            ready(put_on(model, home), compile=False, pack=None)
    # `generate` keeps the tokenizer from functions that it is given, and stops at strings by it.
    tokenizer, strings = arguments.pop("tokenizer", None), arguments.pop("stop_strings", None)
    config = copy.copy(arguments.get("generation_config") or model.generation_config)
    strings = strings or config.stop_strings
    if strings and tokenizer is not None:
        config.stop_strings = None
        criteria = arguments.get("stopping_criteria") or []
        stops = [*criteria, StopStringCriteria(tokenizer, strings)]
        arguments |= {"generation_config": config, "stopping_criteria": StoppingCriteriaList(stops)}
    elif strings:
        arguments["stop_strings"] = strings  # transformers says that it needs a tokenizer
    return type(model).generate(model, *inputs, **{**arguments, "custom_generate": hf_generate})


class OrthrusLM(Qwen3ForCausalLM):  # type: ignore[misc]
    """What `AutoModelForCausalLM` opens the official layout with: a Qwen3 model whose `generate` drafts.

    The published code has a class of this name; `use_diffusion_mode=False` decodes plainly, as there.
    """

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *_: Any,
        config: Any = None,
        dtype: str | torch.dtype = "auto",
        revision: str | None = None,
        **options: Any,
    ) -> PreTrainedModel:
        """Load backbone and view; `config` is read anew, all other options are those of transformers."""
        dtype = options.pop("torch_dtype", None) or dtype  # its former name
        more = {name: value for name, value in options.items() if name not in _OF_AUTO}
        model = load_official(locate(pretrained_model_name_or_path, revision), dtype, **more)
        model.generate = partial(_generate, model)
        return model.eval()


_OF_AUTO = ("trust_remote_code", "code_revision", "_from_auto", "adapter_kwargs")


def _generate(model: PreTrainedModel, *inputs: Any, use_diffusion_mode: bool = True, **arguments: Any) -> Any:
    if not (use_diffusion_mode and is_attached(model)) or arguments.get("custom_generate") is not None:
        return type(model).generate(model, *inputs, **arguments)
    return generate(model, None, *inputs, **arguments)
