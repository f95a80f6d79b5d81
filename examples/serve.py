"""Serve many streams with one model: a session is a stream, and its state is a file.

    python examples/serve.py RUN --sessions FOLDER
    curl -d '{"text": "Call me", "max_new_tokens": 20}' http://127.0.0.1:8000/sessions/ada
    curl -X DELETE http://127.0.0.1:8000/sessions/ada

The second POST to a session goes on where the first ended, today or after a restart. Whoever waits
is served in one batch, one model call a step (examples/sessions.py). Requests of one session are
served one after the other; decoding is greedy.

A session is written when its request ends, and before it is answered. A server that dies in between
has read nothing of that request. Nothing here knows users: put it behind what does.
"""

import argparse
import json
import re
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from sessions import Batcher, Job, Limits, Refused


class Handler(BaseHTTPRequestHandler):
    """Reads one request, waits for its job, writes one line of JSON."""

    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds a client may be silent
    server: "Server"

    def do_POST(self) -> None:
        self._answer(self._continue)

    def do_DELETE(self) -> None:
        self._answer(self._delete)

    def _answer(self, method: Any) -> None:
        try:
            self._reply(200, method())
        except Refused as refusal:
            self._reply(refusal.status, {"error": str(refusal)})

    def _continue(self) -> dict[str, Any]:
        asked = self._body()
        session = self._session()
        unknown = sorted(asked.keys() - {"text", "max_new_tokens"})
        if unknown:
            raise Refused(400, f"unknown {unknown[0]!r}: give text and max_new_tokens")
        text, count = asked.get("text"), asked.get("max_new_tokens", 0)
        if not isinstance(text, str):
            raise Refused(400, "text must be a string, the text that follows in the stream")
        most = self.server.limits.new_tokens
        if type(count) is not int or not 0 <= count <= most:
            raise Refused(400, f"max_new_tokens must be a whole number from 0 to {most}")
        job = Job(session, self.server.encode(text), count)
        self.server.batcher.submit(job)
        job.done.wait()
        if job.refusal is not None:
            raise job.refusal
        return {
            "session": session,
            "text": self.server.decode(job.made),
            "new_tokens": len(job.made),
        }

    def _delete(self) -> dict[str, Any]:
        session = self._session()
        self.server.batcher.delete(session)
        return {"session": session, "deleted": True}

    def _session(self) -> str:
        """The session that the path names."""
        found = re.fullmatch(r"/sessions/([^/]*)", self.path)
        if found is None:
            raise Refused(404, "there is only /sessions/ID: POST to it, or DELETE it")
        self.server.batcher.sessions.file(found[1])
        return found[1]

    def _body(self) -> dict[str, Any]:
        length, most = self.headers.get("Content-Length", ""), self.server.limits.body
        if not re.fullmatch(r"[0-9]{1,18}", length):
            raise Refused(411, "give a Content-Length")
        if int(length) > most:
            self.rfile.read(min(int(length), 16 * most))  # who is still sending hears no answer
            raise Refused(413, f"a request may have {most} bytes: send a longer text in parts")
        data = self.rfile.read(int(length))
        if len(data) < int(length):
            raise Refused(400, f"the body ends after {len(data)} of {length} bytes: send it again")
        try:
            asked = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise Refused(400, "the body is not JSON") from error
        if not isinstance(asked, dict):
            raise Refused(400, 'the body must be an object: {"text": ..., "max_new_tokens": n}')
        return asked

    def _reply(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode() + b"\n"
        self.close_connection |= status >= 400  # its body may not have been read
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses, in the same form; a method it does not know is a 405."""
        self.close_connection = True
        self._reply(405 if code == 501 else code, {"error": message or "this is no HTTP request"})

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: a log of texts is for whoever runs it to decide."""


class Server(ThreadingHTTPServer):
    """The HTTP side: a thread a connection, none of which touches the model."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], batcher: Batcher, tokenizer: Any = None):
        self.batcher, self.limits, self.tokenizer = batcher, batcher.limits, tokenizer
        super().__init__(address, Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is nothing to report."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def encode(self, text: str) -> list[int]:
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise Refused(400, "text holds half of a surrogate pair") from error
        if self.tokenizer is None:
            return np.frombuffer(data, np.uint8).tolist()
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        """Bytes that are no UTF-8, and a letter cut at the end, become U+FFFD."""
        if self.tokenizer is None:
            return bytes(i for i in ids if i < 256).decode("utf-8", "replace")
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve many streams with one model.")
    parser.add_argument("run", type=Path, help="a run folder of `everlong train`")
    parser.add_argument("--sessions", type=Path, required=True, help="where the states are kept")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()

    from everlong.cli.runs import open_run

    try:
        run = open_run(given.run)
        batcher = Batcher(run.model, run.bos, given.sessions, Limits())
        server = Server((given.host, given.port), batcher, run.tokenizer)
    except (Refused, ValueError, OSError, OverflowError) as error:
        sys.exit(f"serve: {error}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"serving {given.run} at http://{given.host}:{server.server_port}", file=sys.stderr)
    try:
        batcher.run()  # here, not in a thread: what breaks the model ends the process
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    main()
