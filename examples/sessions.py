"""Sessions whose states are files, and one batch of all that wait: what examples/serve.py serves.

A session is a stream. Its file holds the state and the last token, which is read together with what
follows it. `state.cat` joins the rows of a step, `state.split` parts them again.
"""

import fcntl
import os
import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from everlong import state as states
from everlong.cli.reader import fingerprint

CHUNK = 256  # tokens of one row that a call reads at most


@dataclass(frozen=True)
class Limits:
    """What a server takes at once; above it a request is refused by a line that says so."""

    batch: int = 16  # rows of a model call
    waiting: int = 256  # requests not yet answered
    sessions: int = 1000  # files in the folder
    days: float = 30.0  # a session unused for longer is refused
    body: int = 1 << 20  # bytes of a request
    new_tokens: int = 4096  # of a request


class Refused(Exception):
    """An answer that is not a result: its HTTP status and one line."""

    def __init__(self, status: int, line: str):
        self.status = status
        super().__init__(line)


@dataclass(eq=False)
class Job:
    """One request. `unread`: the tokens its stream goes on with; the last one is the session's."""

    session: str
    ids: list[int]
    max_new_tokens: int
    state: Any = None
    unread: list[int] = field(default_factory=list)
    made: list[int] = field(default_factory=list)
    refusal: Refused | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def end(self, refusal: Refused | None = None) -> None:
        self.refusal = refusal
        self.done.set()

    @property
    def to_read(self) -> int:
        """Tokens of the next call: the last unread one makes a token, so it waits for the rest."""
        return min(CHUNK, max(1, len(self.unread) - 1))

    @property
    def is_over(self) -> bool:
        return len(self.unread) == 1 and len(self.made) >= self.max_new_tokens


class Sessions:
    """A folder with one safetensors file a session: the state, and the last token, not yet read."""

    def __init__(self, folder: Path, model: Any, bos: int, limits: Limits):
        self.folder, self.model, self.bos, self.limits = folder, model, bos, limits
        self.origin = {"name": "session", "config_hash": fingerprint(model)}
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = os.open(folder, os.O_RDONLY)  # one server a folder
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise Refused(409, f"another server uses {folder}: give --sessions another") from error

    def close(self) -> None:
        """Leave the folder to another server."""
        os.close(self.lock)

    def file(self, session: str) -> Path:
        # Lower case alone: some file systems do not tell "Ada" from "ada".
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", session):
            raise Refused(400, "a session is 1 to 64 of a-z, 0-9, _ and -, no _ or - in front")
        return self.folder / f"{session}.safetensors"

    def names(self) -> set[str]:
        return {file.stem for file in self.folder.glob("[!.]*.safetensors")}

    def open(self, session: str) -> tuple[Any, int]:
        """State and last token; those of a new stream where there is no file."""
        file = self.file(session)
        if not file.exists():
            return self.model.init_state(1), self.bos
        if time.time() - file.stat().st_mtime > self.limits.days * 86400:
            raise Refused(
                410,
                f"{session} was not used for {self.limits.days:g} days: DELETE it to start anew",
            )
        try:
            whole = states.load(file, **self.origin)
        except (ValueError, OSError) as error:  # damaged, of another model, or no file
            raise Refused(409, f"{error}; DELETE {session} to start anew") from error
        device = next(self.model.parameters()).device
        return states.to(whole["stream"], device), int(whole["last"])

    def write(self, session: str, state: Any, last: int) -> None:
        """Aside, then renamed: a reader, or the next server, never sees half of it."""
        whole = {"stream": state, "last": torch.tensor([last])}
        states.save(whole, self.file(session), **self.origin)

    def delete(self, session: str) -> None:
        try:
            self.file(session).unlink()
        except FileNotFoundError as error:
            raise Refused(404, f"there is no session {session}") from error
        except OSError as error:
            raise Refused(409, f"{session} cannot be removed: {error.strerror}") from error


class Batcher:
    """Joins what waits into one call a step. `run` is the only place where the model works."""

    def __init__(self, model: Any, bos: int, folder: Path, limits: Limits):
        self.model, self.limits = model, limits
        eos = model.config.eos_token_id
        self.eos = eos if isinstance(eos, list) else [eos]
        self.sessions = Sessions(folder, model, bos, limits)
        self.waiting: list[Job] = []
        self.active: list[Job] = []
        self.closed = False
        self.changed = threading.Condition()

    def submit(self, job: Job) -> None:
        """Queue a job; `Refused` where a limit is reached."""
        with self.changed:
            open_jobs = self.waiting + self.active
            if self.closed:
                raise Refused(503, "the server is stopping")
            if len(open_jobs) >= self.limits.waiting:
                raise Refused(429, f"{self.limits.waiting} requests are waiting: try again later")
            known = self.sessions.names() | {other.session for other in open_jobs}
            if job.session not in known and len(known) >= self.limits.sessions:
                raise Refused(429, f"{self.limits.sessions} sessions are kept: DELETE one first")
            self.waiting.append(job)
            self.changed.notify()

    def delete(self, session: str) -> None:
        with self.changed:
            if any(job.session == session for job in self.waiting + self.active):
                raise Refused(409, f"{session} is being served: try again later")
            self.sessions.delete(session)

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify()

    @torch.no_grad()
    def run(self) -> None:
        """Serve until `close`; whatever ends it, whoever waits is told."""
        try:
            while self._admit():
                if self.active:
                    self._step()
        finally:
            self.close()
            for job in self.waiting + self.active:
                job.end(Refused(503, "the server stopped, and read nothing of this: send it again"))
            self.sessions.close()

    def _admit(self) -> bool:
        """Move waiting jobs into the batch, one a session, first come first served."""
        with self.changed:
            while not (self.waiting or self.active or self.closed):
                self.changed.wait(0.5)  # a signal just before is not seen by a wait without end
            if self.closed:
                return False
            busy = {job.session for job in self.active}
            chosen = []
            for job in self.waiting:
                if len(self.active) + len(chosen) < self.limits.batch and job.session not in busy:
                    chosen.append(job)
                busy.add(job.session)  # a later request of the session waits for this one
            self.waiting = [job for job in self.waiting if job not in chosen]
            self.active += chosen
        for job in chosen:
            try:
                job.state, last = self.sessions.open(job.session)
                job.unread = [last, *job.ids]
            except Refused as refusal:
                self._end(job, refusal)
        return True

    def _step(self) -> None:
        """One model call: each row reads what it has, and one that has read all makes a token."""
        for job in [job for job in self.active if job.is_over]:
            try:
                self.sessions.write(job.session, job.state, job.unread[0])
                self._end(job)
            except (OSError, SafetensorError) as error:  # the latter is how safetensors says it
                self._end(job, Refused(507, f"the state cannot be written: {error}"))
        rows = self.active
        if not rows:
            return
        counts = torch.tensor([job.to_read for job in rows])
        ids = torch.zeros(len(rows), int(counts.max()), dtype=torch.long)
        for row, job in enumerate(rows):
            ids[row, : counts[row]] = torch.tensor(job.unread[: counts[row]])
        mask = torch.arange(ids.shape[1]) < counts[:, None]
        device = next(self.model.parameters()).device
        joined = states.cat([job.state for job in rows])
        hidden, joined = self.model.body_stream(ids.to(device), joined, mask.to(device))
        last = hidden[torch.arange(len(rows)), counts - 1]
        likeliest = self.model.lm_head(last).argmax(-1).tolist()
        for job, state, token in zip(rows, states.split(joined), likeliest, strict=True):
            self._go_on(job, state, token)

    def _go_on(self, job: Job, state: Any, token: int) -> None:
        if len(job.unread) > 1:
            job.state, job.unread = state, job.unread[job.to_read :]
        elif token in self.eos:  # the text may end here: not read, so that more may follow
            job.max_new_tokens = len(job.made)
        else:
            job.state, job.unread = state, [token]
            job.made.append(token)

    def _end(self, job: Job, refusal: Refused | None = None) -> None:
        with self.changed:
            self.active = [other for other in self.active if other is not job]
        job.end(refusal)
