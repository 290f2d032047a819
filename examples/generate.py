"""Complete a batch of prompts of different length, and see what it cost."""

import orthrus

QUESTIONS = [
    "Ann has 3 boxes with 12 pens each. She gives 7 pens away. How many pens does she have left?",
    "Write a Python function that returns the largest of three numbers.",
]


def main() -> None:
    """Answer the questions with drafts and without; the texts are the same."""
    model, tokenizer = orthrus.load("nano")
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    answers = orthrus.generate(model, tokenizer, chats, max_new_tokens=128)
    plain = orthrus.generate(model, tokenizer, chats, max_new_tokens=128, mode="ar")
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"> {question}\n{answer.text}")
        print(f"[{answer.finish_reason}, {answer.stats.tokens_per_cycle:.1f} tokens per cycle]\n")
    print("identical to plain decoding:", [a.token_ids for a in answers] == [p.token_ids for p in plain])


if __name__ == "__main__":
    main()
