"""A byte-level BPE tokenizer of our own, with a ChatML template and a mask token."""

from collections.abc import Iterable, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from orthrus.checkpoints.tokenizers import QWEN2_PIECES
from orthrus.data.documents import Document
from orthrus.errors import ConfigError

PAD_TOKEN = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
MASK_TOKEN = "<|mask|>"
SPECIAL_TOKENS = (PAD_TOKEN, TURN_START, TURN_END, MASK_TOKEN)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `vocab_size` entries, the special tokens and all 256 bytes among them.

    `max_length` is the backbone's context in tokens. Raises ConfigError if the texts do not fill the
    vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ConfigError(
            f"model.vocab_size: {vocab_size} entries are required, but the texts give "
            f"{tokenizer.get_vocab_size()}; train on more text or ask for a vocabulary of that size"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=PAD_TOKEN,
        mask_token=MASK_TOKEN,
        additional_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def training_texts(documents: Iterable[Document], *, characters: int) -> list[str]:
    """Texts and turns of documents, without template words, up to a number of characters."""
    texts: list[str] = []
    total = 0
    for document in documents:
        parts: Sequence[str] = [m.get("content", "") for m in document.messages] or [document.text]
        texts.extend(parts)
        total += sum(map(len, parts))
        if total >= characters:
            break
    return texts
