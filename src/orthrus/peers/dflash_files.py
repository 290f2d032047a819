"""DFlash drafters on disk: four layouts are read, z-lab's is written.

The layouts differ in their configurations (`DFlashConfig.from_dict`). The reader skips the backbone's tensors
(embeddings, head), and DSpark's confidence head with a warning. Shapes: V vocabulary, D drafted tokens, R rank.
"""

import json
import warnings
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from orthrus.checkpoints import files
from orthrus.errors import CheckpointError
from orthrus.peers.dflash import DFlash, DFlashConfig

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_RENAMED: Final = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
_MARKOV: Final = {"markov_w1.weight": "before_VR", "markov_w2.weight": "after_VR"}
_OF_BACKBONE: Final = ("embed_tokens.", "lm_head.", "verifier_norm.", "verifier_lm_head.")
_CONFIDENCE: Final = ("confidence_head.", "confidence_proj.")


def save(drafter: DFlash, path: Path) -> None:
    """Write a drafter into a directory, in z-lab's layout."""
    names = {ours: theirs for theirs, ours in _RENAMED.items()}
    tensors = {names.get(name, name): tensor for name, tensor in drafter.body.state_dict().items()}
    if drafter.markov is not None:
        for theirs, ours in _MARKOV.items():
            tensors[f"markov_head.{theirs}"] = getattr(drafter.markov, ours)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path / WEIGHTS)
    (path / CONFIG).write_text(json.dumps(drafter.config.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def for_transformers(path: Path) -> PreTrainedModel:
    """Read a drafter as `generate(assistant_model=…)` takes it, with `speculation_type="dflash"`.

    Raises CheckpointError: as `read`, or a variant that transformers' loop does not support.
    """
    drafter = read(path)
    config = drafter.config
    if config.shift or config.causal or config.markov_rank or drafter.vocabulary is not None:
        raise CheckpointError(
            f"{path}: transformers' loop takes plain DFlash drafters, found a variant: use the engine"
        )
    drafter.body.set_attn_implementation("sdpa")
    body: PreTrainedModel = drafter.body
    return body


def read(path: Path) -> DFlash:
    """Read a drafter from a directory, in a layout of z-lab, JetSpec, DeepSpec or speculators.

    Raises CheckpointError: files that are missing or damaged, tensors that are missing, unexpected or misshapen.
    """
    values = files.read_object(path / CONFIG, missing="it is not a drafter")
    with files.described_by(path / CONFIG):
        config = DFlashConfig.from_dict(values, where=str(path))
    tensors = files.read_tensors(path, WEIGHTS)
    offset_D, _ = tensors.pop("d2t", None), tensors.pop("t2d", None)
    with files.described_by(path / CONFIG):
        drafter = DFlash(config, tokens=None if offset_D is None else len(offset_D))
    body: dict[str, Tensor] = {}
    correction: dict[str, Tensor] = {}
    confidence = [name for name in tensors if name.startswith(_CONFIDENCE)]
    if confidence:
        warnings.warn(
            f"{path}: its confidence head is not used ({', '.join(confidence)}): the plan says how many drafts are "
            "verified, as fixed:K, tree:N or auto",
            stacklevel=2,
        )
    for name, tensor in tensors.items():
        bare = name.removeprefix("markov_head.")
        if bare in _MARKOV:
            correction[_MARKOV[bare]] = tensor
        elif not name.startswith((*_OF_BACKBONE, *_CONFIDENCE)):
            body[_RENAMED.get(name, name)] = tensor
    _fill(drafter.body, body, path)
    if offset_D is not None and drafter.vocabulary is not None:
        token_D, vocabulary = offset_D.long() + torch.arange(len(offset_D)), config.shape.vocab_size
        if not 0 <= int(token_D.min()) <= int(token_D.max()) < vocabulary:
            raise CheckpointError(f"{path}: d2t must name tokens below {vocabulary}, found another: it is damaged")
        head = {"head.weight": tensors["lm_head.weight"]} if "lm_head.weight" in tensors else {}
        _fill(drafter.vocabulary, head | {"token_D": token_D}, path)
        if (after_DR := correction.get("after_VR")) is not None:
            if len(after_DR) != len(token_D):
                raise CheckpointError(f"{path}: markov_w2 must have {len(token_D)} rows, found {len(after_DR)}")
            wide_VR = after_DR.new_zeros(vocabulary, after_DR.shape[1])
            correction["after_VR"] = wide_VR.index_copy(0, token_D, after_DR)
    if drafter.markov is not None or correction:
        _fill(drafter.markov or nn.Module(), correction, path)
    return drafter.eval()


def _fill(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: the tensors are not those of its configuration: {error}") from error
