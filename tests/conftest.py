"""What every test stands on: one thread, offline, no memory, repeatable property tests, tokenizers made in memory."""

import gc
import logging
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["ORTHRUS_MODEL"] = "nano"  # unless a test asks for another
os.environ["ORTHRUS_CACHE"] = ""  # nothing is read from disk, and nothing left there
# Help and usage messages are compared as plain text, also where the surroundings ask for colour.
os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"

import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from orthrus.decode import exact, trials
from orthrus.model import traced
from orthrus.model.call import Call
from orthrus.model.traced import Recorder
from tests.families import VOCAB

torch.set_num_threads(1)
# What a probe of exactness looks at: as much only where said.
PROBED = {name: getattr(exact, name) for name in ("_NUMBERS", "_WIDTHS", "_CHUNKS")}
PROBED_TOKENS = {name: getattr(trials, name) for name in ("_READ", "_FEWEST_TOKENS")}
exact._NUMBERS, exact._WIDTHS, exact._CHUNKS = 1 << 12, (4, 8), (32,)
trials._READ, trials._FEWEST_TOKENS = 60, 4
transformers.utils.logging.set_verbosity_error()
logging.getLogger("torch.__trace").propagate = True  # else pytest listens, and torch.compile writes down all it does

# Derandomised: a run that fails fails again; no deadline: the machines that run this are shared.
settings.register_profile(
    "orthrus",
    max_examples=50,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.load_profile("orthrus")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave slow tests to those who ask for them (`pytest -m slow`), and those for a GPU to machines that have one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="gpu: needs a CUDA device"))
    if "slow" not in config.getoption("-m"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: pytest -m slow runs it"))


def pytest_collection_finish() -> None:
    """Let no collection of garbage look at what torch and transformers made when they were imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The passes recorded so far: whether each was before it was needed; else it is when it was met three times."""
    made, record = [], Recorder._record
    monkeypatch.setattr(traced, "USES", 3)

    def note(self: Recorder, kind: traced.Kind, call: Call) -> None:
        made.append(self.at_once)
        record(self, kind, call)

    monkeypatch.setattr(Recorder, "_record", note)
    return made


SPECIAL = ["<pad>", "<bos>", "<eos>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="session")
def characters() -> PreTrainedTokenizerFast:
    """A tokenizer of one token per character, for models of `tests.families` with their 96 tokens."""
    return made_characters()


def made_characters() -> PreTrainedTokenizerFast:
    """Make the tokenizer of the fixture `characters`."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *map(chr, range(33, 33 + VOCAB - len(SPECIAL)))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="!"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def bytelevel() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: every character outside ASCII is split over several tokens."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="session")
def bytefallback() -> PreTrainedTokenizerFast:
    """A BPE with byte fallback, as Llama 2 and Gemma have: what has no token of its own is spelled in bytes."""
    words = ["\u2581", *"abcd.", "ab", "\u2581a", "\u2581ab", "\u2581\u2581", "\ufffd"]
    symbols = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = [("a", "b"), ("\u2581", "a"), ("\u2581", "ab"), ("\u2581", "\u2581")]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    backend = Tokenizer(models.BPE(vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
