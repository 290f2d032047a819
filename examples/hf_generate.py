"""Decode with Orthrus inside Hugging Face's own `generate`."""

import orthrus


def main() -> None:
    """Hand `generate` the decoder; everything else stays as it was."""
    model, tokenizer = orthrus.load("nano")
    chat = [{"role": "user", "content": "Tom buys 4 books for 9 coins each. How much does he pay?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**inputs, custom_generate=orthrus.hf_generate, max_new_tokens=64)
    plain = model.generate(**inputs, do_sample=False, max_new_tokens=64)
    print(tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    print("same tokens as without:", written.tolist() == plain.tolist())


if __name__ == "__main__":
    main()
