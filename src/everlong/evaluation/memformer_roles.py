"""Figure 6 of the Memformer paper: what each slot does with a segment.

At a write a slot *keeps* itself, is *fed* from tokens, or *mixes* both, by its weight on itself,
the mean over heads. The paper gives examples and no limits; ours are `KEEPS` and `FED`.
B batch, N slots.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everlong.evaluation import families
from everlong.evaluation.cells import cell
from everlong.evaluation.language import bits_per_byte
from everlong.evaluation.memformer_ablations import Discarding, rewrite
from everlong.evaluation.recall import interval
from everlong.models.config import EverlongConfig
from everlong.models.hub import EverlongForCausalLM
from everlong.models.sizing import build
from everlong.provenance import git_sha
from everlong.recipes import Data
from everlong.stateful import Trace
from everlong.tasks.text import Documents, encode
from everlong.training.config import TrainConfig

KEEPS, FED = 0.8, 0.2  # self-weights from which a slot keeps itself, and up to which it is fed
START, MIDDLE = (0, 1), (20, 40)  # writes of a document: its first; those called mid-document
Row = dict[str, Any]


@torch.no_grad()
def kept(model: Any, ids: Tensor) -> Tensor:
    """The weight of every slot on itself at every write of ids Int [B, T], whose rows write
    together: [writes, B, N]."""
    trace = Trace()
    model.eval().stream(ids, None, None, trace)
    return torch.stack(trace.records["kept"])


def shares(weights: Tensor) -> Row:
    """Of the self-weights of any shape: the shares of the three roles, and the mean."""
    keeps, fed = weights >= KEEPS, weights <= FED
    return {
        "keep": float(keeps.float().mean()),
        "mix": float((~keeps & ~fed).float().mean()),
        "fed": float(fed.float().mean()),
        "self_weight": float(weights.mean()),
    }


def speeds(weights: Tensor, writer: Any) -> Row:
    """|v| of slots (the mean over all, and over slots as often as they are fed; None where none is)
    and its correlation with the slots' mean self-weight. weights [..., N]."""
    size = writer.bias.detach().float().norm(dim=-1)
    flat = weights.flatten(0, -2)
    fed = (flat <= FED).float().sum(0)
    own = flat.mean(0)
    still = len(size) < 2 or float(own.std()) == 0 or float(size.std()) == 0
    related = None if still else float(np.corrcoef(own.numpy(), size.numpy())[0, 1])
    return {
        "speed": float(size.mean()),
        "fed_speed": float((size * fed).sum() / fed.sum()) if fed.sum() else None,
        "correlation": related,
    }


def of_writes(model: Any, weights: Tensor, start: tuple[int, int], middle: tuple[int, int]) -> Row:
    """`shares` at the first and at the middle writes, and `speeds` at the middle ones. weights
    [writes, ..., N]."""
    inside = weights[slice(*middle)]
    return {
        "start": shares(weights[slice(*start)]),
        "middle": shares(inside) | speeds(inside, model.body.writer),
    }


def of_documents(model: Any, documents: Documents) -> Row:
    """`of_writes` over documents that are long enough; `count` says how many."""
    length, found = model.period, []
    for document in documents:
        ids = encode(document)[: MIDDLE[1] * length]
        if len(ids) == MIDDLE[1] * length:
            found.append(torch.from_numpy(ids.astype(np.int64)))
    weights = kept(model, torch.stack(found))
    return of_writes(model, weights, START, MIDDLE) | {"count": len(found)}


def measure(
    config: EverlongConfig,
    data: Data,
    texts: tuple[Documents, Documents],
    options: TrainConfig,
    seeds: Sequence[int],
    folder: Path,
    say: Callable[[str], None],
) -> list[Row]:
    """A row a seed: roles in the held-out documents of the fresh and of the trained model (a run
    of `families.measure`), and bits per byte with the slots and with M_0 in their place."""
    rows = []
    for seed in seeds:
        seeded, place = replace(options, seed=seed), folder / f"memformer-{seed}"
        trained = families.measure("memformer", config, data, texts, seeded, place)

        def look(seed: int = seed, place: Path = place, trained: Row = trained) -> Row:
            fresh = build(config, seed)
            model = EverlongForCausalLM.from_pretrained(place / "model").eval()
            found = {
                "fresh": of_documents(fresh, texts[1]),
                "trained": of_documents(model, texts[1]),
            }
            rewrite(model, Discarding)
            assert options.segment_length is not None
            without = bits_per_byte(model, texts[1], segment_length=options.segment_length)
            return found | {
                "bits_per_byte": trained["bits_per_byte"],
                "without_slots": without.bits_per_byte,
                "tokens": trained["tokens"],
                "git": git_sha(),
            }

        about = {"train": trained, "start": START, "middle": MIDDLE, "limits": (KEEPS, FED)}
        found = cell(folder / f"roles-{seed}.json", about, look)
        say(f"roles, seed {seed}: keep {found['trained']['middle']['keep']:.2f} mid-document")
        rows.append({"seed": seed, **found})
    return rows


def summary(rows: Sequence[Row]) -> list[Row]:
    """One row for each of fresh and trained, start and middle: means over the seeds and, under
    NAME_interval, their 95 % intervals; None where a seed has none."""
    found = []
    for model in ("fresh", "trained"):
        for where in ("start", "middle"):
            each = [row[model][where] for row in rows]
            line: Row = {"model": model, "where": where}
            for name in each[0]:
                values = [one[name] for one in each]
                known = None not in values
                line[name] = mean(values) if known else None
                line[f"{name}_interval"] = interval(values) if known else None
            found.append(line)
    return found
