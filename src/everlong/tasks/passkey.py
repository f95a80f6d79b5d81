"""Passkey: one number in a long text, asked for at its end, by how deep in the text it stands.

With plain filler:

    There is a pass key in this text: remember it. The long hill joins the even glacier. ... The
    pass key is 85169. ... What is the pass key? The pass key is
    -> 85169

The task of Mohtashami & Jaggi 2023 (arXiv 2305.16300) in words of our own. Its depth is uniform.
Candidates are the number and nine others of as many digits, which the text does not hold.
"""

from dataclasses import dataclass

import numpy as np

from everlong.tasks._shared import check_least
from everlong.tasks._words import numbers
from everlong.tasks.questions import (
    DEPTHS,
    Count,
    Frame,
    Question,
    check_filler,
    depth_group,
    filled,
    num_bytes,
    register_task,
)


@dataclass(frozen=True)
class PasskeyConfig:
    """filler: "plain", or "prose" (Moby-Dick)."""

    length: int = 1024
    digits: int = 5
    num_candidates: int = 10
    filler: str = "plain"

    def __post_init__(self) -> None:
        check_least(self, 2, "digits", "num_candidates")
        check_filler(self.filler)


def make_item(config: PasskeyConfig, seed: int, index: int, count: Count = num_bytes) -> Question:
    """Item `index` of the stream `seed`; both are integers from 0. Groups: depth in quarters."""
    generator = np.random.default_rng((seed, index))
    candidates = numbers(generator, config.num_candidates, config.digits)
    depth = generator.random()
    frame = Frame(
        "There is a pass key in this text: remember it.",
        "What is the pass key? The pass key is",
    )
    fact = f"The pass key is {candidates[0]}."
    prompt = filled(config, frame, [(depth, fact)], generator, count)
    return Question(
        prompt,
        answers=(candidates[0],),
        candidates=tuple(candidates),
        group=depth_group(prompt, frame, fact),
        roles=dict.fromkeys(candidates[1:], "unseen"),
    )


register_task("passkey", make_item, PasskeyConfig(), DEPTHS, "one number, by its depth in the text")
