"""A model is asked the questions of a text task: it reads each prompt as a stream, once.

What it says is its greedy continuation; what it holds likeliest is the candidate of the greatest
log likelihood, all scored from the one state behind the prompt. Memory does not grow with a
prompt's length but by the model's own state: no logits are computed while it is read.

B questions, T tokens, V vocabulary.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everlong import state as states
from everlong.evaluation.codec import Codec
from everlong.state import State
from everlong.tasks.questions import Question

BLOCK = 1024  # tokens a call
_MORE = 2  # tokens made beyond those of the right answer: an answer has to end


@dataclass(frozen=True)
class Reply:
    """said: the greedy continuation. log_likelihoods: nats of each candidate. tokens: of the prompt
    with its bos. state_bytes: of one row behind the prompts of its batch."""

    question: Question
    said: str
    log_likelihoods: tuple[float, ...]
    tokens: int
    state_bytes: int

    @property
    def exact(self) -> bool:
        """Whether all answers are said, each once, and nothing else."""
        return is_exact(self.said, self.question.answers)

    @property
    def found(self) -> float:
        """Share of the answers that are said."""
        words, answers = named(self.said), self.question.answers
        return sum(answer in words for answer in answers) / len(answers)

    @property
    def first(self) -> list[str]:
        """As many candidates as there are answers, the likeliest first; of equals, and of what is
        no number, an answer comes last, so that who holds all alike is never right."""
        nats = np.nan_to_num(np.array(self.log_likelihoods), nan=-np.inf)
        right = np.array([w in self.question.answers for w in self.question.candidates])
        best = np.lexsort((right, -nats))[: len(self.question.answers)]
        return [self.question.candidates[i] for i in best.tolist()]

    @property
    def ranked(self) -> bool:
        """Whether the answers are the likeliest of the candidates."""
        return set(self.first) == set(self.question.answers)

    def traces(self) -> dict[str, float]:
        """By role, the mean nats by which candidates are likelier than those of role "unseen", of
        which the text holds none; empty where there are none. An answer that has a role of its own
        counts there."""
        by_role: dict[str, list[float]] = {}
        for word, nats in zip(self.question.candidates, self.log_likelihoods, strict=True):
            role = self.question.roles.get(word, self.question.role(word))
            by_role.setdefault(role, []).append(nats)
        unseen = by_role.pop("unseen", None)
        if unseen is None:
            return {}
        return {role: float(np.mean(each) - np.mean(unseen)) for role, each in by_role.items()}


def named(said: str) -> list[str]:
    """The words of an answer that was said, up to its end."""
    answer = re.split(r"[.\n?!]", said, maxsplit=1)[0]
    return [word for word in re.split(r"[\s,]+", answer) if word not in ("", "and")]


def is_exact(said: str, answers: Sequence[str]) -> bool:
    """Whether all answers are said, each once in any order, and nothing else."""
    return sorted(named(said)) == sorted(answers)


@torch.no_grad()
def ask(model: Any, codec: Codec, questions: Sequence[Question]) -> list[Reply]:
    """The replies to questions that are asked as one batch; a row's are those it gives alone.

    `model` is a stream model (`advance`, `stream`), read as it stands: put it into eval mode.
    """
    prompts = [np.append(codec.bos, codec.encode(each.prompt)) for each in questions]
    device = next(model.parameters()).device
    # the last token is held back: it is read together with whatever is tried behind it
    state = _read(model, [prompt[:-1] for prompt in prompts], device)
    held = torch.tensor([int(prompt[-1]) for prompt in prompts], device=device)
    scores = _score(model, codec, questions, state, held)
    said = _say(model, codec, questions, state, held)
    size = states.num_bytes(state) // len(questions)
    return [
        Reply(question, text, nats, len(prompt), size)
        for question, text, nats, prompt in zip(questions, said, scores, prompts, strict=True)
    ]


def _read(model: Any, rows: Sequence[np.ndarray], device: torch.device) -> State:
    """The state behind rows of any lengths."""
    state, longest = model.init_state(len(rows)), max(len(row) for row in rows)
    for start in range(0, longest, BLOCK):
        ids, mask = _padded([row[start : start + BLOCK] for row in rows], device)
        state = model.advance(ids, state, None if bool(mask.all()) else mask)
    return state


def _padded(rows: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids int64 [B, T] and where they are real, padded on the right."""
    ids = np.zeros((len(rows), max(len(row) for row in rows)), dtype=np.int64)
    lengths = np.array([len(row) for row in rows])
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
    mask = np.arange(ids.shape[1]) < lengths[:, None]
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def _score(
    model: Any, codec: Codec, questions: Sequence[Question], state: State, held: Tensor
) -> list[tuple[float, ...]]:
    """Log likelihood of each question's candidates."""
    found: list[list[float]] = [[] for _ in questions]
    for place in range(max(len(each.candidates) for each in questions)):
        rows = [i for i, each in enumerate(questions) if place < len(each.candidates)]
        words = [
            codec.continuation(questions[i].prompt, " " + questions[i].candidates[place])
            for i in rows
        ]
        chosen = torch.tensor(rows, device=held.device)
        ids, mask = _padded(words, held.device)
        inputs = torch.cat([held[chosen][:, None], ids[:, :-1]], 1)
        logits, _ = model.stream(inputs, states.select(state, chosen), mask)
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nats = exact.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
        for i, total in zip(rows, nats.masked_fill(~mask, 0).sum(1).tolist(), strict=True):
            found[i].append(total)
    return [tuple(each) for each in found]


def _say(
    model: Any, codec: Codec, questions: Sequence[Question], state: State, held: Tensor
) -> list[str]:
    """The greedy continuations, of each row as long as its right answer and a little more."""
    sizes = [len(codec.continuation(each.prompt, each.target)) + _MORE for each in questions]
    ids = held[:, None]
    made = []
    for _ in range(max(sizes)):
        logits, state = model.stream(ids, state)
        ids = logits[:, -1:].argmax(-1)
        made.append(ids)
    rows = torch.cat(made, 1).cpu().numpy()
    return [codec.decode(row[:size]) for row, size in zip(rows, sizes, strict=True)]
