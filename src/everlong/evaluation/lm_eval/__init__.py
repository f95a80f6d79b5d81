"""The text tasks of everlong for EleutherAI's lm-eval: YAML files, and what they call.

    lm_eval.tasks.TaskManager(include_path=tasks_path(), metadata={"lengths": [512], "samples": 20})

Tasks are called everlong_NAME (greedy generation, exact match) and, where a question has one
answer, everlong_NAME_choice (the likeliest candidate). The metadata sets `lengths` and `samples` of
each length, `seed`, and `tokenizer`, by which lengths are counted: a folder on this machine (that
of `pretrained` if there is none; bytes if there is neither). lm-eval's own command with these tasks
and our model classes is `python -m everlong.evaluation.lm_eval`.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from everlong.tasks.questions import Count, num_bytes, text_task

LENGTHS, SAMPLES = (512, 2048), 100


def tasks_path() -> str:
    """The folder of the YAML files: lm-eval's `include_path`."""
    return str(Path(__file__).parent)


def items(
    task: str,
    lengths: Sequence[int] = LENGTHS,
    samples: int = SAMPLES,
    seed: int = 0,
    count: Count = num_bytes,
) -> list[dict[str, Any]]:
    """Documents of a text task: prompt, target, answers, candidates, label, length and group.

    They are those of `everlong evaluate`: a bos is one of a length's tokens. A length in which some
    item has no room is left out, with a line in the log that says what it needs. Raises
    `ValueError` where none is left.
    """
    made, generator = [], text_task(task)
    needed = generator.needed_by_all(samples, seed, count)
    for length in lengths:
        if needed > length:
            logging.getLogger(__name__).warning(
                "everlong_%s: length %d is missing, it needs %d tokens", task, length, needed
            )
            continue
        for index in range(samples):
            item = generator.behind_bos(length, seed, index, count)
            made.append(
                {
                    "prompt": item.prompt,
                    "target": item.target.strip(),
                    "answers": list(item.answers),
                    "candidates": list(item.candidates),
                    "label": item.candidates.index(item.answers[0]),
                    "length": length,
                    "group": item.group,
                }
            )
    if not made:
        raise ValueError(
            f"no item of {task} fits into lengths {list(lengths)}: it needs {needed} tokens"
        )
    return made
