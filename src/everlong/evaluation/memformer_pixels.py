"""Table 1 of the Memformer paper (arXiv 2010.06891 v2) at toy size: digits pixel by pixel.

Perplexity a pixel of held-out digits: the encoder-decoder and its ablations, Transformer-XL with
several caches, a decoder that sees the whole digit, and an LSTM; equal parameters, equal tokens.
Segments are rows of a digit. The paper does not define its ablations; ours, of the
form with the first number of `slots`:

  no slots        every write is thrown away and the encoder reads M_0: what is left across segments
                  is the encoding of the last one
  no forgetting   v = 0 in every write; M_0 stays a parameter
  one writer head the writer attends with one head, the readers with all

B batch, T time, D hidden_size, N slots.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from everlong import state as states
from everlong.evaluation import memformer_roles as roles
from everlong.evaluation.cells import cell
from everlong.evaluation.memformer_ablations import Discarding, Unforgetting, one_head, rewrite
from everlong.evaluation.recall import check_counts, interval
from everlong.models.config import EverlongConfig
from everlong.models.sizing import build, with_parameters
from everlong.provenance import git_sha
from everlong.registry import check_types
from everlong.state import State
from everlong.tasks.pixels import LENGTH, SIDE, PixelsConfig, epochs, indices, make_batch
from everlong.training.horizon import Horizon

Row = dict[str, Any]
LSTM = "LSTM"


@dataclass(frozen=True)
class PixelsRun:
    """One training, about a minute of one core; the encoder has `encoder_layers` of `num_layers`
    in all, the peak of the rate is that of one cycle (Smith 2018, arXiv 1708.07120)."""

    steps: int = 200
    batch_size: int = 32
    learning_rate: float = 6e-3
    hidden_size: int = 64
    num_heads: int = 4
    num_layers: int = 2
    encoder_layers: int = 1
    slots: tuple[int, ...] = (16, 64, 1)  # the first is that of the ablations
    caches: tuple[int, ...] = (8, 24, 56)
    task: PixelsConfig = field(default_factory=PixelsConfig)

    def __post_init__(self) -> None:
        """`ValueError`, naming the option, for a wrong type or an impossible value."""
        plain = {k: v for k, v in vars(self).items() if k not in ("caches", "slots", "task")}
        check_types(type(self), plain, "pixels")
        for name in ("steps", "batch_size", "encoder_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give 1 or more")
        check_counts("caches", self.caches)
        check_counts("slots", self.slots)
        if self.encoder_layers >= self.num_layers:
            raise ValueError(
                f"encoder_layers {self.encoder_layers} of {self.num_layers} layers leave none for "
                "the decoder"
            )


@dataclass(frozen=True)
class Subject:
    """options: of the model beside what all share; change: of the writer of slots; truncate:
    segments that gradients go back (None: all)."""

    options: Mapping[str, Any]
    change: Callable[[Any], nn.Module] | None = None
    truncate: int | None = None


class LongShortTerm(nn.Module):
    """torch's LSTM between an embedding and a head, with its state in view: the paper's recurrent
    baseline. State: hidden and cell [B, L, G], of L layers of G units."""

    def __init__(self, vocab_size: int, hidden_size: int, units: int, num_layers: int):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, hidden_size)
        self.recurrence = nn.LSTM(hidden_size, units, num_layers, batch_first=True)
        self.head = nn.Linear(units, vocab_size)

    def init_state(self, batch_size: int) -> State:
        places = (batch_size, self.recurrence.num_layers, self.recurrence.hidden_size)
        return {name: torch.zeros(places) for name in ("hidden", "cell")}

    def stream(self, ids: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Logits [B, T, V] of the token behind each position, and the new state."""
        state = self.init_state(len(ids)) if state is None else state
        before = tuple(state[name].transpose(0, 1).contiguous() for name in ("hidden", "cell"))
        y, after = self.recurrence(self.embed(ids), before)
        hidden, cell_state = (held.transpose(0, 1) for held in after)
        return self.head(y), {"hidden": hidden, "cell": cell_state}

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def sized_lstm(run: "PixelsRun", wanted: int) -> Row:
    """The options of the LSTM whose parameters are nearest to `wanted`."""
    options = {
        "vocab_size": run.task.vocab_size,
        "hidden_size": run.hidden_size,
        "num_layers": run.num_layers,
    }

    def away(units: int) -> int:
        with torch.device("meta"):
            return abs(LongShortTerm(units=units, **options).num_parameters() - wanted)

    return options | {"units": min(range(1, 4 * run.hidden_size), key=away)}


def subjects(run: PixelsRun) -> dict[str, Subject]:
    """By name, in the order of the paper's table."""
    memory = {
        "name": "memformer",
        "segment_length": SIDE,
        "num_slots": run.slots[0],
        "encoder_layers": run.encoder_layers,
    }
    layers = run.num_layers - run.encoder_layers

    def memformer(change: Any = None, **options: Any) -> Subject:
        return Subject({"num_layers": layers, "segment": memory | options}, change)

    def cached(length: int, truncate: int | None) -> Subject:
        options = {"segment_length": SIDE, "memory_length": length}
        mixers = {"transformer_xl": options}
        return Subject({"layers": ["transformer_xl"], "mixers": mixers}, truncate=truncate)

    found = {"decoder, whole digit": Subject({})}
    found |= {f"transformer_xl, cache {length}": cached(length, 1) for length in run.caches}
    found[f"transformer_xl, cache {max(run.caches)}, gradients through it"] = cached(
        max(run.caches), None
    )
    counts = sorted(run.slots, reverse=True)
    found |= {slotted(count): memformer(num_slots=count) for count in counts}
    return found | {
        "memformer, no slots": memformer(Discarding),
        "memformer, temperature 1": memformer(temperature=1.0),
        "memformer, no forgetting": memformer(Unforgetting),
        "memformer, one writer head": memformer(one_head),
    }


def slotted(count: int) -> str:
    return f"memformer, {count} slot{'s' * (count > 1)}"


def config_of(subject: Subject, run: PixelsRun) -> EverlongConfig:
    shared = {
        "vocab_size": run.task.vocab_size,
        "bos_token_id": run.task.bos,
        "eos_token_id": None,
        "pad_token_id": None,
        "hidden_size": run.hidden_size,
        "num_heads": run.num_heads,
        "num_layers": run.num_layers,
    }
    return EverlongConfig(**{**shared, **subject.options})


def sized(run: PixelsRun) -> dict[str, Row]:
    """The options of every subject's model, at the parameters of the Memformer that is ablated."""
    found = {name: config_of(subject, run) for name, subject in subjects(run).items()}
    wanted = build(found[slotted(run.slots[0])], 0).num_parameters()
    return {LSTM: sized_lstm(run, wanted)} | {
        name: _plain(with_parameters(config, wanted)) for name, config in found.items()
    }


def _plain(config: EverlongConfig) -> Row:
    """Without the versions of what built it."""
    kept = config.to_diff_dict()
    return {k: v for k, v in kept.items() if k not in ("transformers_version", "model_type")}


def model_of(name: str, options: Row, run: PixelsRun, seed: int) -> Any:
    """A fresh model: an EverlongForCausalLM, or the LSTM."""
    if name == LSTM:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LongShortTerm(**options)
    model, change = build(EverlongConfig(**options), seed), subjects(run)[name].change
    if change is not None:
        rewrite(model, change)
    return model


def train(
    model: Any,
    run: PixelsRun,
    seed: int,
    truncate: int | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """One optimiser step a batch of digits, by back-propagation through the whole digit or through
    `truncate` segments."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=run.learning_rate)
    rate = OneCycleLR(optimiser, run.learning_rate, total_steps=run.steps, pct_start=0.1)
    horizon = Horizon("full", truncate=truncate)

    def step(segment: tuple[Tensor, Tensor], state: State) -> tuple[Tensor, State]:
        logits, state = model.stream(segment[0], state)
        nats = F.cross_entropy(logits.flatten(0, 1), segment[1].flatten(), reduction="sum")
        return nats / (run.batch_size * LENGTH), state

    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for index, chosen in enumerate(epochs(run.task, seed, run.batch_size, run.steps)):
            batch = make_batch(run.task, chosen)
            size = LENGTH if truncate is None else SIDE  # one call is back-propagated whole
            segments = list(
                zip(batch.inputs.split(size, 1), batch.targets.split(size, 1), strict=True)
            )
            optimiser.zero_grad()
            state = model.init_state(len(chosen))
            loss, _ = horizon(step, segments, state, [1.0] * len(segments))
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            rate.step()
            on_step(index + 1, float(loss))
    model.eval()


@torch.no_grad()
def perplexity(model: Any, run: PixelsRun, seed: int) -> float:
    """A pixel of the digits held out under `seed`."""
    batch = make_batch(run.task, indices(run.task, seed, "test"))
    logits, _ = model.eval().stream(batch.inputs)
    return math.exp(float(F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())))


@torch.no_grad()
def state_bytes(model: Any, run: PixelsRun) -> int:
    """What one stream holds at the end of a digit."""
    return states.num_bytes(model.stream(make_batch(run.task, [0]).inputs)[1])


def _roles(model: Any, run: PixelsRun, seed: int) -> Row | None:
    """What slots do in the digits held out, at the first write and in the middle; None without
    slots."""
    if isinstance(model.body.writer, Discarding):
        return None
    ids = make_batch(run.task, indices(run.task, seed, "test")).inputs
    return roles.of_writes(model, roles.kept(model, ids), (0, 1), (SIDE // 2, SIDE))


def measure_one(name: str, options: Row, run: PixelsRun, seed: int) -> Row:
    """Train and score one subject; of a memformer also `roles` of its slots (as in
    evaluation.memformer_roles), and `slots_wiped`: the perplexity of the same weights when nothing
    is written."""
    model = model_of(name, options, run, seed)
    train(model, run, seed, None if name == LSTM else subjects(run)[name].truncate)
    row = {
        "perplexity": perplexity(model, run, seed),
        "parameters": model.num_parameters(),
        "state_bytes": state_bytes(model, run),
        "git": git_sha(),
    }
    if name.startswith("memformer"):
        row["roles"] = _roles(model, run, seed)
        rewrite(model, Discarding)
        row["slots_wiped"] = perplexity(model, run, seed)
    return row


def measure(
    run: PixelsRun, seeds: Sequence[int], folder: Path, say: Callable[[str], None]
) -> list[Row]:
    """Every subject over the seeds, a file of `folder` each, made once; each seed holds out other
    digits. `say` is told of each."""
    git_sha()  # that of the code which is loaded now
    models, rows = sized(run), []
    for seed in seeds:
        for name, options in models.items():
            about = {"run": asdict(run), "model": options, "subject": name, "seed": seed}

            def result(name: str = name, options: Row = options, seed: int = seed) -> Row:
                return measure_one(name, options, run, seed)

            file = name.replace(",", "").replace(" ", "-")
            found = cell(folder / f"{file}-{seed}.json", about, result)
            say(f"{name}, seed {seed}: perplexity {found['perplexity']:.4f}")
            rows.append({"name": name, "seed": seed, **found})
    return rows


def summary(rows: Sequence[Row], base: str) -> list[Row]:
    """One row a subject: mean perplexity and its 95 % interval over seeds; `gap` and `gap_interval`
    of the difference to `base` seed by seed (the same digits are held out); the mean of what the
    same weights have with the slots wiped."""
    by_name: dict[str, dict[int, Row]] = {}
    for row in rows:
        by_name.setdefault(row["name"], {})[row["seed"]] = row
    found = []
    for name, same in by_name.items():
        values = [row["perplexity"] for row in same.values()]
        gaps = [row["perplexity"] - by_name[base][seed]["perplexity"] for seed, row in same.items()]
        wiped = [row["slots_wiped"] for row in same.values() if "slots_wiped" in row]
        first = next(iter(same.values()))
        found.append(
            {
                "name": name,
                "seeds": len(same),
                "perplexity": mean(values),
                "interval": interval(values),
                "gap": mean(gaps),
                "gap_interval": interval(gaps),
                "slots_wiped": mean(wiped) if wiped else None,
                "state_bytes": first["state_bytes"],
                "parameters": first["parameters"],
            }
        )
    return found
