"""Chats to try instruction finetuning on: questions about small sums, the order of letters and what was said before.

python examples/make_chats.py chats.jsonl 2000
"""

import json
import random
import sys


def question(draw: random.Random) -> tuple[str, str]:
    a, b = draw.randrange(10), draw.randrange(10)
    first, second = draw.sample("abcdefghijklmnopqrstuvwxyz", 2)
    return draw.choice(
        [
            (f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."),
            (f"Which comes first, {first} or {second}?", f"{min(first, second)} comes first."),
            (f"Say {first} three times.", f"{first} {first} {first}"),
        ]
    )


def chat(draw: random.Random) -> list[dict[str, str]]:
    turns = [{"role": "system", "content": "Answer in one line."}] if draw.random() < 0.5 else []
    for _ in range(draw.randint(1, 3)):
        asked, answer = question(draw)
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return turns


if __name__ == "__main__":
    path, number = sys.argv[1], int(sys.argv[2])
    with open(path, "w", encoding="utf-8") as file:
        for seed in range(number):
            file.write(json.dumps({"messages": chat(random.Random(seed))}) + "\n")
