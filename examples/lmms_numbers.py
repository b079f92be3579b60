"""Tasks of lmms-eval about pictures of handwritten numbers, and the same questions as records of a batch job.

    pip install 'smolvlm-jax[train,lmms-eval]' && pip install --no-deps lmms_eval
    python examples/lmms_numbers.py runs/task
    python -m lmms_eval --model smolvlm_jax --model_args pretrained=tiny --include_path runs/task --tasks numbers --batch_size 1
    smolvlm-jax batch runs/task/numbers.jsonl runs/answers --model tiny --max-new-tokens 20

The digits are ones that occur in no training picture. A folder for --include_path holds a YAML file for each task and the
functions that it names; these tasks read their documents from numbers.jsonl beside them.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from number_pictures import make

QUESTION = "What number is written here?"

# `{data}` is the file of the documents.
TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: {output_type}
doc_to_visual: !function numbers_of.pictures
doc_to_text: {text}
doc_to_target: {target}
{settings}
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""
GENERATION = "generation_kwargs: {max_new_tokens: 20, temperature: 0, do_sample: false}"

FUNCTIONS = '''"""What the tasks of this folder do with a document."""

from pathlib import Path

from PIL import Image


def pictures(doc):
    return [Image.open(Path(__file__).parent / doc["image"])]


def in_two_rounds(doc, lmms_eval_specific_kwargs=None, round_idx=None, previous_output=None, previous_round_info=None):
    """The question, then once more; the picture comes with both."""
    if not round_idx:
        return doc["prompt"]
    return pictures(doc), doc["prompt"], round_idx == 2, previous_output, None


def last_is_right(doc, results):
    return {"exact_match": float(results[0][-1].strip() == doc["answer"])}
'''


def write_tasks(folder: Path, count: int, seed: int) -> None:
    """Write the pictures, numbers.jsonl, and the tasks numbers, numbers_choices and numbers_twice."""
    make(folder / "pictures", count, seed)
    rng = np.random.default_rng(seed)
    with (folder / "numbers.jsonl").open("w") as file:
        for picture in sorted((folder / "pictures").iterdir()):
            answer = picture.stem.split("_")[1]
            others = {str(int(answer) + int(n)) for n in rng.integers(1, 9, 3)}
            choices = sorted({answer, *others}, key=lambda text: (text[::-1], text))
            doc = {"id": picture.name, "image": f"pictures/{picture.name}", "prompt": QUESTION, "answer": answer}
            file.write(json.dumps({**doc, "choices": choices, "right": choices.index(answer)}) + "\n")
    (folder / "numbers_of.py").write_text(FUNCTIONS)
    tasks = {
        "numbers": ("generate_until", "prompt", "answer", GENERATION, "exact_match"),
        "numbers_choices": ("multiple_choice", "prompt", "right", "doc_to_choice: choices", "acc"),
        "numbers_twice": (
            "generate_until_multi_round",
            "!function numbers_of.in_two_rounds",
            "answer",
            f"{GENERATION}\nprocess_results: !function numbers_of.last_is_right",
            "exact_match",
        ),
    }
    for name, (output_type, text, target, settings, metric) in tasks.items():
        given = {"output_type": output_type, "text": text, "target": target, "settings": settings, "metric": metric}
        data = (folder / "numbers.jsonl").resolve()
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data, **given))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=2024)
    options = parser.parse_args(arguments)
    write_tasks(options.folder, options.count, options.seed)


if __name__ == "__main__":
    main()
