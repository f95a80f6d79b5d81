"""Every damage that is counted: what is done, how the thing is then read, what must come of it."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from everlong.evaluation.reliability import damage, hostile
from everlong.evaluation.reliability.damage import newest


@dataclass(frozen=True)
class Damage:
    """door: "resume" (an unfinished run), "use" (a finished one) or "state" (a state file);
    refused: whether nothing may come of it but one line; None: anything without a traceback."""

    do: damage.Damager
    door: str
    refused: bool | None = True


def _on(part: Callable[[Path], Path], do: damage.Damager) -> damage.Damager:
    return lambda pick, folder: do(pick, part(folder))


def _weights(folder: Path) -> Path:
    return folder / "RUN" / "model" / "model.safetensors"


def _config(folder: Path) -> Path:
    return folder / "RUN" / "model" / "config.json"


def _state(folder: Path) -> Path:
    return folder / "state.safetensors"


def _edited(pick: random.Random, file: Path) -> str:
    damage.edit_json(pick, file)
    return f"{file.name} edited"


def _pickled_file(part: Callable[[Path], Path]) -> damage.Damager:
    def do(pick: random.Random, folder: Path) -> str:
        part(folder).write_bytes(hostile.pickled(pick, folder))
        return f"{part(folder).name} is a pickle"

    return do


def _without_sums(do: damage.Damager) -> damage.Damager:
    """As in a folder that this command line did not write."""

    def both(pick: random.Random, folder: Path) -> str:
        (folder / "RUN" / "model" / "SHA256SUMS").unlink(missing_ok=True)
        return do(pick, folder)

    return both


DAMAGES: dict[str, Damage] = {
    "a checkpoint's file cut short": Damage(_on(newest, damage.cut_short), "resume"),
    "bits of a checkpoint flipped": Damage(_on(newest, damage.flip_bits), "resume"),
    "a checkpoint's file removed": Damage(_on(newest, damage.remove), "resume"),
    "files of checkpoints swapped": Damage(damage.swap, "resume"),
    "JSON of a checkpoint edited": Damage(_on(newest, damage.edit), "resume"),
    "JSON edited and signed anew": Damage(_on(newest, damage.edit_signed), "resume", None),
    "JSON nested without end": Damage(_on(newest, damage.nested), "resume"),
    "paths out of a checkpoint": Damage(hostile.outside, "resume"),
    "links and pipes in a checkpoint": Damage(hostile.link, "resume"),
    "a pickle in a checkpoint": Damage(hostile.pickle_in, "resume"),
    "pickles beside a checkpoint": Damage(hostile.pickle_beside, "resume"),
    "headers that lie, signed": Damage(hostile.header_signed, "resume"),
    "the run's own files": Damage(damage.run_file, "resume", None),
    "finished weights cut short": Damage(_on(_weights, damage.cut_short), "use"),
    "bits of finished weights flipped": Damage(_on(_weights, damage.flip_bits), "use"),
    "headers of finished weights that lie": Damage(_on(_weights, hostile.header), "use"),
    "the same, without sums": Damage(_without_sums(_on(_weights, hostile.header)), "use"),
    "a pickle for finished weights": Damage(_without_sums(_pickled_file(_weights)), "use"),
    "pickles beside a finished model": Damage(_without_sums(hostile.pickle_beside), "use"),
    "an index that leads out of a model": Damage(_without_sums(hostile.index), "use"),
    "a finished model's config": Damage(_on(_config, _edited), "use", None),
    "a finished model's config, bits": Damage(_on(_config, damage.flip_bits), "use", None),
    "a state file cut short": Damage(_on(_state, damage.cut_short), "state"),
    "bits of a state file flipped": Damage(_on(_state, damage.flip_bits), "state"),
    "a state file's header that lies": Damage(_on(_state, hostile.header), "state"),
    "a pickle for a state file": Damage(_pickled_file(_state), "state"),
}
