"""Attach an untrained view to some model of transformers: neither its logits nor its texts change."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import orthrus


def tiny_llama() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A random model and a tokenizer of single bytes, in place of `from_pretrained`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=257, max_position_embeddings=512, eos_token_id=None, **shape)
    return LlamaForCausalLM(config).eval(), PreTrainedTokenizerFast(tokenizer_object=backend)


def main() -> None:
    """Compare logits before and after `attach`, and the text with Hugging Face's own."""
    model, tokenizer = tiny_llama()
    inputs = tokenizer("Any prompt at all", return_tensors="pt")
    with torch.no_grad():
        before = model(**inputs).logits
        expected = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        orthrus.attach(model, orthrus.OrthrusConfig(block_size=8))
        print("logits unchanged, bit for bit:", torch.equal(before, model(**inputs).logits))
    answer = orthrus.generate(model, tokenizer, "Any prompt at all", max_new_tokens=32)[0]
    prompt = inputs["input_ids"].shape[1]
    print("same text as Hugging Face's generate:", answer.token_ids == expected[0, prompt:].tolist())


if __name__ == "__main__":
    main()
