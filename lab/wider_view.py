"""Give a trained view twins in more layers, which start as the backbone's attention: the same drafts, more to train.

    python lab/wider_view.py smollm2 24 FOLDER

FOLDER then is the `model.start_from` of a recipe with `model.layers = "last:24"`.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

import orthrus
from orthrus.checkpoints.files import save
from orthrus.checkpoints.load import backbone_with_tokenizer
from orthrus.model.attach import attach, config_of
from orthrus.model.fingerprint import twin_tensors
from orthrus.model.markov import install, untrained

name, upper, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
trained, _ = orthrus.load(name, dtype="float32", device="cpu", pack=False)
wide, _ = backbone_with_tokenizer(name)
count, config = wide.config.num_hidden_layers, config_of(trained)
attach(wide, replace(config, layers=tuple(range(count - upper, count))), attn_implementation="orthrus")
install(wide, untrained(wide, config.markov_rank))
tensors = twin_tensors(wide)
with torch.no_grad():
    for key, tensor in twin_tensors(trained).items():
        tensors[key].copy_(tensor)
save(wide, folder)
