"""A race of peers: published drafters in our engine, the view, copies and block-diffusion models.

Each peer is a contender of `bench.speed.run`; its training, memory and cost of a draft go into a separate record.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any, Final

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orthrus.bench.peers import hf
from orthrus.bench.peers.watch import Watch
from orthrus.bench.race import PLAIN, Answer, Clock, Contender, Decoder
from orthrus.bench.session import Loader
from orthrus.checkpoints.drafters import KINDS as DRAFTERS
from orthrus.checkpoints.drafters import load_drafter
from orthrus.checkpoints.files import read_object
from orthrus.checkpoints.load import backbone_with_tokenizer, locate
from orthrus.decode.api import engine_for
from orthrus.decode.drafters import Drafter, ViewDrafter
from orthrus.decode.options import Options
from orthrus.errors import ConfigError
from orthrus.model.attach import duals, layers_of
from orthrus.model.markov import markov_of
from orthrus.model.twin import in_dtype
from orthrus.policy import steps as plans
from orthrus.provenance import digest_of

PEER: Final = "peer"
"""Kind of the records that describe peers."""
TRAINING: Final = "training.json"
"""The file with the cost of training, beside the weights (`orthrus.train.plan.notes`)."""
VIEW, LOOKUP, BLOCKS = "orthrus", "lookup", "blocks"
HF: Final = ("hf-lookup", "hf-draft", "hf-dflash")
KINDS: Final = (*DRAFTERS, VIEW, LOOKUP, BLOCKS, *HF)
COSTED: Final = 24
"""Tokens to write when drafts and verifications are timed."""
_PIECE, _PIECES = 64, 4096
"""Bytes of a sample, and samples of a file."""
_WITH_WEIGHTS: Final = (*DRAFTERS, BLOCKS, "hf-draft", "hf-dflash")


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """One participant of a race.

    Attributes:
        source: a directory or Hub id of its weights; None for copies and for the model's own view.
        how: a plan; for block-diffusion models how tokens are unmasked (`Unmasking.parse`).
    """

    kind: str
    source: str | None = None
    how: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Peer":
        """Read `KIND`, `KIND=SOURCE`, `KIND@HOW` or `KIND=SOURCE@HOW`; raises ConfigError for anything else."""
        rest, _, how = text.partition("@")
        kind, _, source = rest.partition("=")
        if kind not in KINDS:
            raise ConfigError(f"a peer is of a kind of {', '.join(KINDS)}, found {text!r}")
        if (kind in _WITH_WEIGHTS) > bool(source) or (source and kind in (LOOKUP, "hf-lookup")):
            raise ConfigError(
                f"a peer of kind {kind} {'needs' if kind in _WITH_WEIGHTS else 'has no'} weights, found {text!r}"
            )
        if how and kind in HF:
            raise ConfigError(f"{kind} has no plans, found {text!r}")
        if kind == BLOCKS:
            from orthrus.peers.blocks import Unmasking

            Unmasking.parse(how or "0.9")
        elif kind not in HF:
            copies = plans.parse(how or ("lookup" if kind == LOOKUP else "full")).lookup
            if copies != (kind == LOOKUP) and kind != VIEW:
                raise ConfigError(f"the plans lookup and lookup:M are those of the peer lookup, found {text!r}")
        return cls(kind=kind, source=source or None, how=how or None)

    @property
    def label(self) -> str:
        """The name in tables: the kind, with the name of the weights where that differs."""
        parts = [part for part in Path(self.source or "").parts if part not in ("model", "/", ".")]
        return self.kind if not parts or parts[-1] == self.kind else f"{self.kind}:{parts[-1]}"

    @property
    def contender(self) -> Contender:
        default = {LOOKUP: "lookup", BLOCKS: "0.9"}.get(self.kind, None if self.kind in HF else "full")
        return Contender(self.label, self.how or default)

    def weights(self) -> str | None:
        """Return a digest of the weights' sizes and evenly spaced samples; the source without safetensors."""
        if self.source is None:
            return None
        files = sorted(locate(self.source).glob("*.safetensors"))
        return digest_of(b"".join(_samples(file) for file in files)) if files else self.source


@dataclass(kw_only=True, slots=True)
class Entrant:
    """A loaded peer: its decoder, and the facts of its record."""

    decode: Decoder
    facts: dict[str, Any]
    watch: Watch | None = None


@dataclass(kw_only=True, slots=True)
class Field:
    """The peers of a race, loaded for the model of each precision in turn.

    `load` returns a loader of a source with another view; `contexts` are lengths of random prompts that are timed too.
    """

    peers: Sequence[Peer]
    load: Callable[[str], Loader]
    contexts: Sequence[int] = ()
    clock: Clock = perf_counter
    loaded: dict[Contender, Entrant] = field(default_factory=dict)
    model: Any = None

    def __post_init__(self) -> None:
        names = [peer.contender.name for peer in self.peers]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(
                f"each peer must have a name of its own, found {', '.join(twice)} more than once: name each one once, "
                "or rename the folders that hold their weights"
            )

    def decoders(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[Contender, Decoder]:
        """Load every peer for a model; plain decoding is among the decoders.

        Raises:
            ConfigError: the model's context is too short for `contexts`.
            CheckpointError: weights of a peer are missing or damaged.
        """
        context = model.config.get_text_config().max_position_embeddings
        if max(self.contexts, default=0) + COSTED > context:
            raise ConfigError(
                f"--context must be at most {context - COSTED} with this model, found {max(self.contexts)}"
            )
        self.loaded, self.model = {}, model
        eos = Options.of(model.generation_config).eos_token_id
        for peer in self.peers:
            self.loaded[peer.contender] = self._entrant(peer, model, tokenizer, eos)
        plain = _engine(model, tokenizer, eos, "ar", None, Watch(self.clock, model))
        return {PLAIN: plain, **{who: entrant.decode for who, entrant in self.loaded.items()}}

    def cost(self, batches: Sequence[int]) -> None:
        """Time drafts and verifications after random prompts too."""
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        timed = [(entrant.decode, entrant.watch) for entrant in self.loaded.values() if entrant.watch is not None]
        for batch, context in product(batches, self.contexts):
            random = Random(context)
            prompts = [[random.randrange(vocabulary) for _ in range(context)] for _ in range(batch)]
            for decode, watch in timed:
                watch.context = context
                decode(prompts, COSTED)
                watch.context = None

    def records(self, labels: Mapping[str, Any]) -> list[dict[str, Any]]:
        out = []
        for who, entrant in self.loaded.items():
            named = {"dtype": _name_of(self.model.dtype), "mode": who.mode, "plan": who.plan}
            costs = {} if entrant.watch is None else entrant.watch.to_dict()
            out.append({"kind": PEER, **labels, **named, **entrant.facts, **costs})
        return out

    def _entrant(
        self, peer: Peer, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, eos: tuple[int, ...]
    ) -> Entrant:
        facts: dict[str, Any] = {"training": _training(peer.source)}
        if peer.kind in HF:
            return Entrant(decode=_transformers(peer, model, eos), facts=facts)
        if peer.kind == BLOCKS:
            decode, network = _blocks(peer, model, eos)
            return Entrant(decode=decode, facts=facts | _sizes(network))
        if peer.kind == VIEW:
            if peer.source is not None:
                model, _ = self.load(peer.source)(_name_of(model.dtype))
            parts = [dual.diffusion for dual in duals(model)] + [markov_of(model)]
            facts |= _sizes(nn.ModuleList([part for part in parts if part is not None]))
            facts |= {"key_bytes_per_token": 0}
            drafter: Drafter | None = ViewDrafter(markov_of(model))
        elif peer.kind == LOOKUP:
            drafter = None
        else:
            drafter = load_drafter(f"{peer.kind}:{peer.source}", model)
            facts |= _sizes(next((part for part in vars(drafter).values() if isinstance(part, nn.Module)), None))
        watch = Watch(self.clock, model)
        decode = _engine(model, tokenizer, eos, str(peer.contender.plan), drafter, watch)
        return Entrant(decode=decode, facts=facts, watch=watch)


def _engine(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    eos: tuple[int, ...],
    plan: str,
    drafter: Drafter | None,
    watch: Watch,
) -> Decoder:
    """Decode in our engine, and record the time of each text's first token."""
    parsed = plans.parse(plan)
    if drafter is not None:
        watch.follow(drafter)

    def decode(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Answer]:
        options = Options(max_new_tokens=max_new_tokens, eos_token_id=eos)
        engine = engine_for(model, prompts, options, parsed, rows=len(prompts), passes=watch.passes, drafter=drafter)
        watch.batch = len(prompts)
        began = watch.clock()
        first: dict[int, float] = {}
        ids = [engine.add(ids, options, tokenizer=tokenizer, index=index) for index, ids in enumerate(prompts)]
        rows = {}
        for progress in engine.run():
            first.setdefault(progress.row.id, watch.clock() - began)
            rows[progress.row.id] = progress.row
        stores = [store for layer, store in engine.cache.stores.items() if layer >= len(layers_of(model))]
        watch.key_bytes = sum(store.nbytes for store in stores) // (engine.cache.rows * engine.cache.capacity)
        return [Answer.of(rows[id], first_token_seconds=first[id]) for id in ids]

    return decode


def _transformers(peer: Peer, model: PreTrainedModel, eos: tuple[int, ...]) -> Decoder:
    """Decode in transformers' loop, with lookup, a small model or a DFlash drafter."""
    backbone = hf.plain(model)
    more: dict[str, Any] = {}
    if peer.kind == "hf-dflash":
        from orthrus.peers.dflash_files import for_transformers

        small = for_transformers(locate(str(peer.source)))
    elif peer.source is not None:
        small, _ = backbone_with_tokenizer(peer.source)
    if peer.source is not None:
        more["assistant_model"] = in_dtype(small, model.dtype).to(model.device).eval()
    return hf.decoder(backbone, peer.kind, eos, **more)


def _blocks(peer: Peer, model: PreTrainedModel, eos: tuple[int, ...]) -> tuple[Decoder, PreTrainedModel]:
    """Decode with a block-diffusion model, prompt after prompt."""
    from orthrus.peers.blocks import Unmasking, load, write

    network, config = load(locate(str(peer.source)), dtype=model.dtype, device=model.device)
    how = Unmasking.parse(peer.how or "0.9")

    def decode(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Answer]:
        made = [write(network, config, how, prompt, max_new_tokens=max_new_tokens, eos=eos) for prompt in prompts]
        return [Answer.counted(one.token_ids, one.forwards) for one in made]

    return decode, network


def _sizes(network: nn.Module | None) -> dict[str, int]:
    if network is None:
        return {}
    parameters = list(network.parameters())
    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "weight_bytes": sum(parameter.nbytes for parameter in parameters),
    }


def _training(source: str | None) -> dict[str, Any] | None:
    """Return the cost of training, where a file beside the weights holds it."""
    if source is None or not (file := locate(source) / TRAINING).is_file():
        return None
    return read_object(file, missing="it does not say what training took")


def _samples(file: Path) -> bytes:
    """Return the size of a file and short pieces of it, evenly spaced."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        pieces = [size.to_bytes(8, "little")]
        for start in range(0, size, max(_PIECE, size // _PIECES)):
            stream.seek(start)
            pieces.append(stream.read(_PIECE))
    return b"".join(pieces)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
