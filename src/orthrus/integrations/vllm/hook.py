"""What vLLM asks an architecture about its configuration, before any weight is loaded.

Refuses what `checks` finds, and sets the two things that drafts need. Imports vLLM only to name its version.
"""

import logging
from typing import Any

from orthrus.errors import ConfigError
from orthrus.integrations.vllm import checks

_log = logging.getLogger("vllm.orthrus")


class OrthrusConfigHook:
    """The entry of `MODELS_CONFIG_MAP` for Orthrus checkpoints."""

    @staticmethod
    def verify_and_update_config(config: Any) -> None:
        """Refuse or complete a `VllmConfig` whose target is an Orthrus checkpoint.

        Raises ConfigError: everything that stands in the way, one sentence each.
        """
        from vllm import __version__

        problems = checks.problems(config, version=__version__)
        if problems:
            raise ConfigError(f"{config.model_config.model} cannot be served: {'; '.join(problems)}")
        if config.speculative_config is not None:
            prepare(config)

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Leave a model's own configuration as it is."""


def prepare(config: Any) -> None:
    """Ask for attention that can see both ways, and for no more rows than one pass can draft for.

    A pass takes `max_num_batched_tokens`; a row that drafts needs K + 1 of them to verify, and as many to draft.
    """
    if config.attention_config.backend is None:
        config.attention_config.use_non_causal = True
    scheduler, block = config.scheduler_config, config.speculative_config.num_speculative_tokens + 1
    rows = scheduler.max_num_batched_tokens // block
    if rows < 1:
        raise ConfigError(
            f"--max-num-batched-tokens must be at least {block} for {block - 1} drafts, found "
            f"{scheduler.max_num_batched_tokens}: raise it"
        )
    if rows < scheduler.max_num_seqs:
        _log.warning(
            "Orthrus: max_num_seqs lowered from %d to %d, because %d batched tokens hold no more rows of %d; raise "
            "--max-num-batched-tokens for more",
            scheduler.max_num_seqs,
            rows,
            scheduler.max_num_batched_tokens,
            block,
        )
        scheduler.max_num_seqs = rows
