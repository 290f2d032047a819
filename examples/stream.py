"""Print a sampled answer as it is written, with each cycle's accepted drafts in brackets."""

import orthrus


def main() -> None:
    """Stream one answer; the seed makes it the same every time."""
    model, tokenizer = orthrus.load("nano")
    chat = [{"role": "user", "content": "Make a table of three fruits with their price and weight."}]
    options = {"max_new_tokens": 128, "do_sample": True, "temperature": 0.7, "top_p": 0.95, "seed": 7}
    for chunk in orthrus.stream(model, tokenizer, chat, **options):
        drafts = f"[{chunk.draft_text}]" if chunk.draft_text else ""
        print(drafts + chunk.bonus_text, end="", flush=True)
    print(f"\n{chunk.finish_reason}: {chunk.stats.tokens_per_cycle:.1f} tokens per cycle")


if __name__ == "__main__":
    main()
