"""Makes train.jsonl and test.jsonl of this folder from a copy of GSM8K.

python data/gsm8k/make_subset.py --data PATH_TO_GSM8K

PATH_TO_GSM8K holds train.jsonl and test.jsonl with `question` and `answer`, as in
github.com/openai/grade-school-math/tree/master/grade_school_math/data. The choice of rows is a
function of the seed alone: the same input gives the same bytes.
"""

import argparse
import json
import random
from pathlib import Path

SEED = 0
ROWS = {"train": 1500, "test": 200}
# Longer rows would be cut at the lengths that a laptop trains with.
MAX_CHARACTERS = 700


def convert(row: dict[str, str]) -> dict[str, str]:
    """Turns a question and its worked answer into a prompt and a completion."""
    return {"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {row['answer']}"}


def main() -> None:
    """Writes both files next to this script."""
    parser = argparse.ArgumentParser(description="Make the GSM8K subset of this folder.")
    parser.add_argument("--data", type=Path, required=True, help="folder with the full GSM8K")
    folder = parser.parse_args().data
    for name, count in ROWS.items():
        with open(folder / f"{name}.jsonl", encoding="utf-8") as file:
            rows = [convert(json.loads(line)) for line in file]
        rows = [row for row in rows if len(row["prompt"]) + len(row["completion"]) < MAX_CHARACTERS]
        # Sorted, so that the subset keeps the order of the original.
        chosen = sorted(random.Random(SEED).sample(range(len(rows)), count))
        text = "".join(json.dumps(rows[i], ensure_ascii=False) + "\n" for i in chosen)
        Path(__file__).with_name(f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
