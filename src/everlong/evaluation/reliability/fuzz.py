"""Random recipes and command lines: every one ends with an exit code, none with a traceback.

Each runs in this process through the command line's own `main`, in a folder with a text, a trained
run, a stopped one and files of the wrong kind. Whatever would train is stopped as its optimiser is
made; all else after a few seconds of processor time, and what asks for too much memory is refused
it. The process is a worker: one that dies or hangs is a finding, and the next one goes on.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from everlong.evaluation.reliability.cases import Case, Vocabulary, make
from everlong.evaluation.reliability.guarded import (
    MEMORY,
    Main,
    Outcome,
    call,
    make_run,
    memory_at_most,
    no_training,
)

BLOCK = 1000  # cases a worker
CPU_S = 3.0  # of one case
BENCH_CPU_S = 0.5  # of one that measures: what it refuses it refuses at once
PATIENCE_S = 180.0  # without a case finished
Line = dict[str, Any]


def measure(
    cases: int, seed: int, folder: Path, doors: Any, say: Callable[[str], None]
) -> dict[str, Any]:
    """Outcomes by kind of case, and every failure with its words and files.

    What is done lies in `folder`: a count that was stopped goes on there.
    """
    kept = folder / "kept"
    if not kept.exists():
        _furnish(doors.main, folder / "making")
        (folder / "making").rename(kept)
    log = folder / f"cases-{seed}.jsonl"
    log.touch()
    while (done := len(_lines(log))) < cases:
        last = min(done + BLOCK, cases)
        ended = _watch([*doors.worker, str(folder), str(seed), str(done), str(last)], log)
        if len(_lines(log)) < last:
            line = {"case": len(_lines(log)), "kind": "any", "outcome": ended, "place": ended}
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        say(f"{len(_lines(log)):,} of {cases:,}: {_failures(_lines(log))} failed")
    return _summary(_lines(log)[:cases])


def _watch(command: Sequence[str], log: Path) -> str:
    """Run a worker to its end, or until it hangs; how it died. `RuntimeError` for its own fault."""
    quiet = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRACKIO_DIR": str(log.parent / "track"),
    }
    process = subprocess.Popen(
        command, env=os.environ | quiet, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    size, since = -1, time.monotonic()
    while True:
        try:
            _, said = process.communicate(timeout=1.0)
            break
        except subprocess.TimeoutExpired:
            if log.stat().st_size != size:
                size, since = log.stat().st_size, time.monotonic()
            elif time.monotonic() - since > PATIENCE_S:
                process.kill()
                process.communicate()
                return "hung"
    if process.returncode > 0:
        raise RuntimeError(f"the worker failed: {said.decode(errors='replace')[-2000:]}")
    return f"died by {signal.Signals(-process.returncode).name}" if process.returncode else ""


def _lines(log: Path) -> list[Line]:
    return [json.loads(line) for line in log.read_text("utf-8").splitlines()]


def _furnish(main: Main, folder: Path) -> None:
    """What lies where the cases run: good files and bad ones."""
    shutil.rmtree(folder, ignore_errors=True)
    changes = "train.steps=4", "train.checkpoint_every=2"
    run = make_run(main, folder / "run", *changes)
    stopped = shutil.copytree(run, folder / "stopped")
    shutil.rmtree(stopped / "model")
    (stopped / "results.json").unlink()
    half = shutil.copytree(stopped, folder / "half")
    (half / "checkpoint-00000004" / "model.safetensors").unlink()
    words = ["generate", str(run), "--prompt", "the", "--max-new-tokens", "1"]
    outcome = call(main, [*words, "--save-state", str(folder / "state.safetensors")])
    if outcome.code != 0:
        raise RuntimeError(f"no state was saved: {outcome.said or outcome.trace}")
    (folder / "folder").mkdir()
    (folder / "folder" / "a").write_text("some text\n" * 100)
    (folder / "empty").touch()
    (folder / "binary").write_bytes(bytes(range(256)) * 8)
    (folder / "broken.toml").write_text("[train\nsteps = ")
    (folder / "tiny.toml").write_text('base = "smoke"\n[data]\nsource = "text.txt"\n')
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {}}')
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("gone")


def work(main: Main, vocabulary: Vocabulary, folder: Path, seed: int, cases: range) -> None:
    """Run `cases` and append a line for each to the log in `folder`. Changes directory."""
    place = folder / "place"
    log = (folder / f"cases-{seed}.jsonl").resolve()
    kept = (folder / "kept").resolve()
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(kept, place, symlinks=True)
    os.chdir(place)
    import_module("matplotlib.figure")  # a limit inside of its import would break it for all others
    clean = _listing(Path())
    with log.open("a", encoding="utf-8") as file, no_training(), memory_at_most(MEMORY):
        for number in cases:
            line = {"case": number, **run_case(main, make(seed, number, vocabulary))}
            file.write(json.dumps(line) + "\n")
            file.flush()
            if _listing(Path()) != clean:
                _clean(Path(), kept)
                clean = _listing(Path())


def run_case(main: Main, case: Case) -> Line:
    """Write its files here, run its words, and say what came of it."""
    for name, data in case.files.items():
        Path(name).write_bytes(data)
    cpu_s = BENCH_CPU_S if case.words[:1] == ("bench",) else CPU_S
    outcome = call(main, case.words, case.stdin, cpu_s)
    line: Line = {"kind": case.kind, "outcome": _name(outcome)}
    if fails(outcome):
        files = {
            name: data.decode("utf-8", "backslashreplace") for name, data in case.files.items()
        }
        line |= {"place": outcome.place or "what it said", "said": outcome.said[-500:]}
        line |= {"words": case.words, "files": files, "trace": outcome.trace}
    return line


def fails(outcome: Outcome) -> bool:
    """An exception that left main, or a refusal that is not one line."""
    return outcome.kind == "raised" or (outcome.code == 2 and not outcome.refused)


def _name(outcome: Outcome) -> str:
    return f"exit {outcome.code}" if outcome.kind == "exit" else outcome.kind


def _listing(folder: Path) -> list[tuple[str, int, int]]:
    found = []
    for root, folders, names in os.walk(folder):
        for name in [*names, *folders]:
            status = os.lstat(os.path.join(root, name))
            kind = 0 if name in folders else status.st_mtime_ns
            found.append((os.path.join(root, name), kind, status.st_size))
    return sorted(found)


def _clean(place: Path, kept: Path) -> None:
    """Everything as it was."""
    for path in place.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    shutil.copytree(kept, place, symlinks=True, dirs_exist_ok=True)


def _failures(lines: Sequence[Line]) -> int:
    return sum("place" in line for line in lines)


def _summary(lines: Sequence[Line]) -> dict[str, Any]:
    outcomes = Counter(f"{line['kind']}, {line['outcome']}" for line in lines)
    failed = [line for line in lines if "place" in line]
    places: dict[str, Line] = {}
    for line in failed:
        known = places.setdefault(line["place"], {"times": 0, "first": line})
        known["times"] += 1
    kinds = Counter(line["kind"] for line in lines)
    both = " and ".join(f"{count:,} {kind}s" for kind, count in sorted(kinds.items()))
    ends = Counter(line["outcome"] for line in lines)
    told = ", ".join(f"{name} {count:,}" for name, count in ends.most_common())
    return {
        "tried": len(lines),
        "failed": len(failed),
        "note": f"{both}: {told}",
        "outcomes": dict(sorted(outcomes.items())),
        "failures": [{"place": place, **known} for place, known in places.items()],
    }
