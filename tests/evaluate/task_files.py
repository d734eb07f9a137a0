"""Local files of tasks with a few questions, and the same questions as the Hub has them."""

import json

MMLU = {
    "anatomy": [
        ['A ""dished"" face, often', "one", "two, or", "three", "four", "B"],
        ["Which is it? ", "a", "b", "c", "d", "D"],
        ["What of it?", "e", "f", "g", "h", "A"],
    ],
    "astronomy": [["How far?", "1", "2", "3", "4", "C"], ["How old?", "5", "6", "7", "8", "A"]],
}
DEV = ["An example?", "w", "x", "y", "z", "C"]
# (line of the file, what the Hub has of it)
HELLASWAG = [
    (
        "Roof removal: A man is sitting on a roof. he",
        {"activity_label": "Roof removal", "ctx_a": "A man is sitting on a roof.", "ctx_b": "he"},
        ["sings.", "sleeps.", "dives in.", "starts pulling."],
        "3",
    ),
    (
        'Sign: A sign reads "hello, you." the woman',
        {"activity_label": "Sign", "ctx_a": 'A sign reads "hello, you."', "ctx_b": "the woman"},
        ["waves.", "reads it aloud.", "is a sign.", "is 5."],
        "1",
    ),
    (
        "Health: How to rest. Lie down. It helps.",
        {
            "activity_label": "Health",
            "ctx_a": "[header] How to rest [title] Lie down. [step] It helps.",
            "ctx_b": "",
        },
        ["Then sleep.", "Then run.", "Then eat.", "Then sing."],
        "0",
    ),
]
ARC = [
    ("Which is likely?", ["density", "years", "days"], ["A", "B", "C"], "C"),
    ("Which is built?", ["fast", "safe", "nice", "cheap"], ["1", "2", "3", "4"], "2"),
]
GSM8K = [
    ("How many eggs?", "16 - 3 = <<16-3=13>>13\n#### 13"),
    ("How many bolts?", "2 / 2 = 1\n#### 3"),
    ("How much?", "It is 5.\n#### 1,005"),
]


def write(folder):
    """All four tasks."""
    for split, data in (("test", MMLU), ("dev", {subject: [DEV] for subject in MMLU})):
        place = folder / "mmlu" / split
        place.mkdir(parents=True)
        for subject, rows in data.items():
            lines = (",".join(f'"{cell}"' for cell in row) for row in rows)
            (place / f"{subject}_{split}.csv").write_text("".join(f"{line}\n" for line in lines))
    for name in ("hellaswag", "arc", "gsm8k"):
        (folder / name).mkdir()
    items = ["\n".join((line, right, *endings)) for line, _, endings, right in HELLASWAG]
    (folder / "hellaswag" / "hellaswag_val_full.txt").write_text("\n".join(items) + "\n")
    _write_lines(folder / "arc" / "ARC-Challenge-Test.jsonl", map(_arc, ARC))
    _write_lines(folder / "arc" / "ARC-Challenge-Dev.jsonl", map(_arc, ARC[:1]))
    items = ({"question": question, "answer": answer} for question, answer in GSM8K)
    _write_lines(folder / "gsm8k" / "test.jsonl", items)
    return folder


def hub(path, name=None, **unused):
    """`datasets.load_dataset` of the same questions."""
    from datasets import Dataset, DatasetDict

    if path == "cais/mmlu":
        rows = {"test": [_unquoted(row) for row in MMLU[name]], "dev": [_unquoted(DEV)]}
    elif path == "Rowan/hellaswag":
        items = [{**fields, "endings": ends, "label": right} for _, fields, ends, right in HELLASWAG]
        rows = {"train": items, "validation": items}
    elif path == "allenai/ai2_arc":
        items = [
            {"question": question, "choices": {"text": texts, "label": labels}, "answerKey": key}
            for question, texts, labels, key in ARC
        ]
        rows = {"train": items[:1], "validation": items[:1], "test": items}
    else:
        assert (path, name) == ("openai/gsm8k", "main")
        items = [{"question": question, "answer": answer} for question, answer in GSM8K]
        rows = {"train": items, "test": items}
    return DatasetDict({split: Dataset.from_list(items) for split, items in rows.items()})


def _unquoted(row):
    question, *choices, letter = (cell.replace('""', '"') for cell in row)
    return {"question": question, "choices": choices, "answer": "ABCD".index(letter)}


def _arc(item):
    question, texts, labels, key = item
    choices = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    return {"id": "x", "question": {"stem": question, "choices": choices}, "answerKey": key}


def _write_lines(file, items):
    file.write_text("".join(f"{json.dumps(item)}\n" for item in items))
