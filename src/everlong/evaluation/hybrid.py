"""What one attention layer in four gives to linear layers, and what it costs.

Recall: four times as many pairs as a head's key is wide (tasks/mqar; HGRN has no keys), by stacks
of four layers, all of one linear kind or the last of them attention, behind one short convolution
over the embeddings, by which a value's position sees its key; trained by a curriculum. Language:
eight layers at equal parameters, at several ratios of linear layers to attention.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from everlong.errors import UserError
from everlong.evaluation import families
from everlong.evaluation.cells import cell
from everlong.evaluation.curriculum import until_learnt
from everlong.evaluation.recall import FAMILIES, HELD_OUT, WATCHED, Subject, build, fit
from everlong.evaluation.recall import accuracy as answered
from everlong.evaluation.recall import summary as by_name
from everlong.evaluation.report import plot_hybrid
from everlong.mixers.linear import ShortConvolution
from everlong.models import sizing
from everlong.models.config import EverlongConfig
from everlong.models.hub import EverlongForCausalLM
from everlong.provenance import git_sha, write_results
from everlong.registry import check_types, memory_entry
from everlong.stack import Block, Stack
from everlong.state import State, num_bytes
from everlong.stateful import Stateful, Trace
from everlong.tasks.mqar import MqarBatch, MqarConfig, make_batch

KINDS = tuple(name for name in FAMILIES["linear"] if name not in ("sliding_attention", "mom"))
PURE, HYBRID = "pure", "one attention layer in four"
FORMS = {PURE: 0, HYBRID: 1}  # attention layers of the four
RATIOS = {"pure": 0, "7:1": 1, "3:1": 2, "1:1": 4, "attention": 8}  # attention layers of eight
_LAYERS = 8
Row = dict[str, Any]


@dataclass(frozen=True)
class HybridRun:
    """Recall of 4 `key_size` pairs, in stages of 2, 4, 8 ... pairs; `steps` are the most of one
    training. A stage ends when it is learnt, or when half of the steps left are spent on it."""

    steps: int = 1600
    batch_size: int = 32
    learning_rate: float = 3e-3
    hidden_size: int = 32
    num_heads: int = 4
    key_size: int = 4  # of a head; values are hidden_size / num_heads wide
    vocab_size: int = 64
    watch_every: int = 25
    watch_items: int = 64
    test_items: int = 512

    def __post_init__(self) -> None:
        """`ValueError`, naming the option, for a wrong type or an impossible value."""
        check_types(HybridRun, vars(self), "hybrid")
        for name, value in vars(self).items():
            if name != "learning_rate" and value < 1:
                raise ValueError(f"{name} is {value}: give 1 or more")
        if self.learning_rate <= 0:
            raise ValueError("learning_rate must be above 0")
        self.task(self.pairs)

    @property
    def pairs(self) -> int:
        return 4 * self.key_size

    def task(self, pairs: int) -> MqarConfig:
        """Every key is asked for; eight fillers stand between the questions."""
        return MqarConfig(3 * pairs + 8, pairs, vocab_size=self.vocab_size)


class Convolution(Stateful):
    """A short convolution between two maps: the layer below both forms. State: its tail."""

    def __init__(self, width: int, size: int = 4):
        super().__init__()
        self.hidden_size = width
        self.inner, self.out = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.convolution = ShortConvolution(width, size)

    def init_state(self, batch_size, *, device=None, dtype=None) -> State:
        device, dtype = self._defaults(device, dtype)
        return {"tail": self.convolution.tail(batch_size, device, dtype)}

    def run(
        self, x: Tensor, state: State, lengths: Tensor | None, trace: Trace | None
    ) -> tuple[Tensor, State]:
        y, tail = self.convolution(self.inner(x), state["tail"], lengths)
        return self.out(y), {"tail": tail}


def subject_of(kind: str, form: str, run: HybridRun) -> Subject:
    """Five layers: one for the convolution, and four of the form."""
    attention = FORMS[form]
    layers = ("sliding_attention", *[kind] * (4 - attention), *["attention"] * attention)
    options = {"key_size": run.key_size} if "key_size" in memory_entry(kind).fields else {}
    return Subject(5, None, {kind: options}, layers, intermediate_size=2 * run.hidden_size)


def model_of(kind: str, form: str, run: HybridRun, seed: int) -> EverlongForCausalLM:
    """The subject, with the convolution in its place."""
    model = build(subject_of(kind, form, run), run.task(run.pairs), run, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        cast(Block, cast(Stack, model.body.core).blocks[0]).mixer = Convolution(run.hidden_size)
    return model


def accuracy(model: EverlongForCausalLM, task: MqarConfig, seed: int, items: int) -> float:
    """Share of the questions answered on items (seed, 0 ...)."""
    model.eval()
    found = answered(model, make_batch(task, seed, range(items)), task.length)
    model.train()
    return found


@torch.no_grad()
def state_bytes(model: EverlongForCausalLM, task: MqarConfig) -> int:
    """What one stream holds at the end of an item."""
    _, state = model.stream(make_batch(task, 0, range(1)).inputs)
    return num_bytes(state)


def batches(model: EverlongForCausalLM, run: HybridRun, seed: int) -> Iterator[MqarBatch]:
    """Training batches until `model` recalls all pairs, or `steps` of them."""
    stages = [pairs for i in range(1, 64) if (pairs := 2**i) < run.pairs] + [run.pairs]

    def batch(pairs: int, step: int) -> MqarBatch:
        first = step * run.batch_size
        return make_batch(run.task(pairs), seed, range(first, first + run.batch_size))

    def score(pairs: int) -> float:
        return accuracy(model, run.task(pairs), seed + WATCHED, run.watch_items)

    return until_learnt(stages, run.steps, run.watch_every, batch, score, hurry=True)


def recall(
    run: HybridRun,
    kinds: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    say: Callable[[str], None],
) -> list[Row]:
    """Every kind in both forms over the seeds, a file of `folder` each, made once: rows of name,
    form, seed, accuracy and steps (made); `say` is told of each."""
    rows = []
    for seed in seeds:
        for kind in kinds:
            for form in FORMS:

                def result(kind: str = kind, form: str = form, seed: int = seed) -> Any:
                    model, steps = model_of(kind, form, run, seed), [0]
                    given = batches(model, run, seed)
                    length = run.task(run.pairs).length
                    fit(
                        model,
                        given,
                        length,
                        run.learning_rate,
                        on_step=lambda step, _: steps.append(step),
                    )
                    task = run.task(run.pairs)
                    found = accuracy(model, task, seed + HELD_OUT, run.test_items)
                    return {"accuracy": found, "steps": steps[-1], "git": git_sha()}

                file = f"{kind}-{FORMS[form]}-{seed}.json"
                subject = subject_of(kind, form, run)
                about = {"run": asdict(run), "form": form, "subject": asdict(subject)}
                found = cell(folder / file, about, result)
                say(
                    f"{kind}, {form}, seed {seed}: {found['accuracy']:.3f} ({found['steps']} steps)"
                )
                model = model_of(kind, form, run, seed)
                size = {
                    "parameters": model.num_parameters(),
                    "state_bytes": state_bytes(model, run.task(run.pairs)),
                }
                rows.append({"name": kind, "form": form, "seed": seed, **found, **size})
    return rows


def language_config(whole: EverlongConfig, ratio: str) -> EverlongConfig:
    """`whole`, whose eight layers are one linear kind, with as many of them attention as `RATIOS`
    says, and as many parameters."""
    if whole.num_layers != _LAYERS:
        raise UserError(f"num_layers is {whole.num_layers}: the ratios are those of {_LAYERS}")
    attention = RATIOS[ratio]
    config = copy.deepcopy(whole)
    linear = (_LAYERS - attention) // max(1, attention)
    config.layers = whole.layer_names[:1] * linear + ["attention"] * min(1, attention)
    return sizing.with_parameters(config, sizing.build(whole, 0).num_parameters())


def recall_summary(rows: Sequence[Row]) -> list[Row]:
    """Means over seeds with their intervals, by kind and form."""
    return by_name(rows, "form")


def language_summary(rows: Sequence[Row]) -> list[Row]:
    """As `families.summary`, in the order of the ratios."""
    order = list(RATIOS)
    return sorted(families.summary(rows), key=lambda row: order.index(row["name"]))


def write(
    path: Path,
    run: HybridRun,
    language: Mapping[str, Any],
    kind: str,
    recalled: Sequence[Row],
    read: Sequence[Row],
    diverged: Sequence[Row],
) -> None:
    """Rows and summaries as JSON with provenance, and the picture beside it."""
    found = recall_summary(recalled), language_summary(read)
    write_results(
        path,
        "everlong bench hybrid",
        {"recall": asdict(run), "language": dict(language)},
        summary={"recall": found[0], "language": found[1]},
        rows={"recall": list(recalled), "language": list(read)},
        diverged=list(diverged),
    )
    plot_hybrid(*found, run.pairs, run.task(run.pairs).chance, kind, path.with_suffix(".png"))
