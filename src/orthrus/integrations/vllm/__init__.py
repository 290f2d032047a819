"""Orthrus inside vLLM: a plugin that vLLM finds through the entry point `vllm.general_plugins`.

Checkpoints of the official layout are served by `model`; with the speculative method `draft_model` and the checkpoint
itself as the draft model, `v1` and `v2` drive the draft pass in vLLM's two model runners. Importing this module loads
neither torch nor vLLM; `register` loads no more than vLLM has loaded by then.
"""

import logging

ARCHITECTURE = "OrthrusLM"
"""What `config.json` of an official checkpoint names; the published ones too."""


def register() -> None:
    """Make Orthrus checkpoints known to vLLM, which calls it in each of its processes, any number of times.

    Nothing is refused or raised here: the configuration hook refuses, for Orthrus checkpoints alone.
    """
    try:
        from vllm.model_executor.models import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    except ImportError as error:
        logging.getLogger("vllm.orthrus").warning("This vLLM cannot serve Orthrus checkpoints: %s", error)
        return

    from orthrus.integrations.vllm import dispatch, hook

    ModelRegistry.register_model(ARCHITECTURE, "orthrus.integrations.vllm.model:OrthrusForCausalLM")
    MODELS_CONFIG_MAP[ARCHITECTURE] = hook.OrthrusConfigHook
    dispatch.install()
