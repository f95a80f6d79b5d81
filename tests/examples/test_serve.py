"""examples/serve.py under load, through real HTTP: nobody's stream is mixed up with another's."""

import importlib
import json
import os
import signal
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import pytest
import torch

from everlong import EverlongConfig, EverlongForCausalLM
from everlong.cli.reader import Reader

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = [f"session-{index}" for index in range(12)]
ROUNDS = 3


@pytest.fixture(scope="module", autouse=True)
def examples():
    """The folder is where `python examples/serve.py` looks for its other half."""
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("serve"), importlib.import_module("sessions")
    sys.path.remove(str(EXAMPLES))
    del sys.modules["serve"], sys.modules["sessions"]


def tiny(seed=0):
    torch.manual_seed(seed)
    segment = {"name": "memformer", "segment_length": 8, "num_slots": 4}
    sizes = {"hidden_size": 16, "num_heads": 2, "num_layers": 1}
    model = EverlongForCausalLM(EverlongConfig(**sizes, segment=segment))
    with torch.no_grad():  # likeliest tokens depend on the stream, not on a bias of random weights
        model.lm_head.weight.mul_(4)
    return model.double().eval()


@pytest.fixture(scope="module")
def model():
    return tiny()


@contextmanager
def serving(examples, model, folder, **limits):
    """`ask(method, session, value)` -> (status, answer) of a server on a free port."""
    serve, sessions = examples
    batcher = sessions.Batcher(model, 256, folder, sessions.Limits(**limits))
    server = serve.Server(("127.0.0.1", 0), batcher)
    threads = [threading.Thread(target=each) for each in (batcher.run, server.serve_forever)]
    for thread in threads:
        thread.start()

    def ask(method, path, value=None, body=None):
        connection = HTTPConnection("127.0.0.1", server.server_port, timeout=60)
        body = body if value is None else json.dumps(value).encode()
        connection.request(method, path if path.startswith("/") else f"/sessions/{path}", body)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        assert text.count(b"\n") == 1
        assert text.endswith(b"\n")
        return answer.status, json.loads(text)

    ask.batcher, ask.port = batcher, server.server_port
    try:
        yield ask
    finally:
        server.shutdown()
        batcher.close()
        for thread in threads:
            thread.join()
        server.server_close()


def request(name, turn):
    """Texts of all lengths, in the middle of segments too; every third reads or writes alone."""
    seed = 7 * NAMES.index(name) + turn
    text = "" if seed % 3 == 2 else f"{name} says {turn} " * (1 + seed % 5)
    return {"text": text, "max_new_tokens": 0 if seed % 3 == 1 else 5 + seed % 11}


def talk(ask, name, turns):
    answers = []
    for turn in turns:
        status, answer = ask("POST", name, request(name, turn))
        assert status == 200, answer
        assert answer["session"] == name
        answers.append(answer["text"])
    return answers


@pytest.fixture(scope="module")
def alone(examples, model, tmp_path_factory):
    """What each session gets from a server of its own turn: nobody beside it."""
    with serving(examples, model, tmp_path_factory.mktemp("alone")) as ask:
        return {name: talk(ask, name, range(ROUNDS)) for name in NAMES}


def test_alone_is_what_the_command_line_reads_and_makes(model, alone):
    for name in NAMES[:3]:
        reader, made = Reader(model, 256), []
        for turn in range(ROUNDS):
            asked = request(name, turn)
            reader.read(torch.tensor(list(asked["text"].encode()), dtype=torch.uint8).numpy())
            ids = []
            for _ in range(asked["max_new_tokens"]):
                logits, state = model.stream(reader.held, reader.state)
                reader.state, reader.held = state, logits[:, -1:].argmax(-1)
                ids.append(int(reader.held))
            assert model.config.eos_token_id not in ids
            made.append(bytes(i for i in ids if i < 256).decode("utf-8", "replace"))
        assert made == alone[name]
    assert len({tuple(answers) for answers in alone.values()}) > len(NAMES) // 2


def test_a_crowd_gets_what_each_gets_alone_and_a_restart_changes_nothing(
    examples, model, alone, tmp_path, monkeypatch
):
    rows, stream = [], model.body_stream
    monkeypatch.setattr(
        model, "body_stream", lambda ids, *more: rows.append(len(ids)) or stream(ids, *more)
    )
    found = {name: [] for name in NAMES}
    for turns in (range(2), range(2, ROUNDS)):  # two lives of the server
        with (
            serving(examples, model, tmp_path, batch=5) as ask,
            ThreadPoolExecutor(len(NAMES)) as pool,
        ):
            answers = pool.map(lambda name, turns=turns: talk(ask, name, turns), NAMES)
            for name, told in zip(NAMES, answers, strict=True):
                found[name] += told
    assert found == alone
    assert max(rows) == 5
    assert sorted(file.stem for file in tmp_path.iterdir()) == sorted(NAMES)


def test_requests_of_one_session_are_served_one_after_the_other(examples, model, tmp_path):
    asked = {"text": "again and again", "max_new_tokens": 12}
    with serving(examples, model, tmp_path) as ask:
        one_by_one = [ask("POST", "calm", asked)[1]["text"] for _ in range(4)]
        with ThreadPoolExecutor(24) as pool:
            told = list(pool.map(lambda index: ask("POST", f"busy-{index % 6}", asked), range(24)))
        for index in range(6):
            mine = [answer["text"] for _, answer in told[index::6]]
            assert sorted(mine) == sorted(one_by_one)
        assert ask("DELETE", "calm") == (200, {"session": "calm", "deleted": True})
        assert ask("POST", "calm", asked)[1]["text"] == one_by_one[0]


def test_a_text_longer_than_a_call_is_the_same_in_parts(examples, model, tmp_path):
    text = "a long text without an end, " * 30
    with serving(examples, model, tmp_path) as ask:
        whole = ask("POST", "whole", {"text": text, "max_new_tokens": 9})
        ask("POST", "parts", {"text": text[:601]})
        parts = ask("POST", "parts", {"text": text[601:], "max_new_tokens": 9})
    assert parts[1]["text"] == whole[1]["text"]


def test_the_end_of_a_text_is_not_read(examples, tmp_path):
    model = tiny()
    with serving(examples, model, tmp_path) as ask:
        first = ask("POST", "a", {"text": "so", "max_new_tokens": 6})[1]
        assert first["new_tokens"] == 6
        made = first["text"].encode()
        ask.batcher.eos = [257, made[0]]
        stopped = ask("POST", "b", {"text": "so", "max_new_tokens": 6})[1]
        assert (stopped["text"], stopped["new_tokens"]) == ("", 0)
        ask.batcher.eos = [None]
        assert ask("POST", "b", {"text": "", "max_new_tokens": 6})[1]["text"] == first["text"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "words"),
    [
        ("POST", "UPPER", b"{}", 400, "a-z"),
        ("POST", "..%2Fetc", b"{}", 400, "a-z"),
        ("POST", "x" * 65, b"{}", 400, "1 to 64"),
        ("POST", "/elsewhere", b"{}", 404, "/sessions/ID"),
        ("POST", "a", b"{", 400, "not JSON"),
        ("POST", "a", b"[" * 100_000, 400, "not JSON"),
        ("POST", "a", b"[1]", 400, "an object"),
        ("POST", "a", b"{}", 400, "text must be"),
        ("POST", "a", b'{"text": 3}', 400, "text must be"),
        ("POST", "a", b'{"text": "\\ud800"}', 400, "surrogate"),
        ("POST", "a", b'{"text": "x", "max_tokens": 3}', 400, "max_new_tokens"),
        ("POST", "a", b'{"text": "x", "max_new_tokens": true}', 400, "0 to 4096"),
        ("POST", "a", b'{"text": "x", "max_new_tokens": 4097}', 400, "0 to 4096"),
        ("POST", "a", b'{"text": "' + b"x" * 200_000 + b'"}', 413, "200000 bytes"),
        ("POST", "a", None, 400, "not JSON"),
        ("PUT", "a", None, 405, "PUT"),
        ("DELETE", "a", None, 404, "no session a"),
        ("DELETE", "UPPER", None, 400, "a-z"),
    ],
)
def test_a_bad_request_is_one_clear_line_and_keeps_nothing(
    quiet, method, path, body, status, words
):
    ask, folder = quiet
    told, answer = ask(method, path, body=body)
    assert told == status
    assert words in answer["error"]
    assert not list(folder.iterdir())


@pytest.fixture(scope="module")
def quiet(examples, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quiet")
    with serving(examples, model, folder, body=200_000) as ask:
        yield ask, folder


def test_limits_and_old_or_foreign_sessions_are_refused_clearly(examples, model, tmp_path):
    with serving(examples, model, tmp_path, sessions=2, days=1) as ask:
        for name in ("one", "two"):
            assert ask("POST", name, {"text": "x"})[0] == 200
        told, answer = ask("POST", "three", {"text": "x"})
        assert (told, answer["error"]) == (429, "2 sessions are kept: DELETE one first")
        old = tmp_path / "one.safetensors"
        os.utime(old, (0, 0))
        told, answer = ask("POST", "one", {"text": "x"})
        assert told == 410
        assert "DELETE" in answer["error"]
        old.write_bytes(old.read_bytes()[:100])
        os.utime(old)
        told, answer = ask("POST", "one", {"text": "x"})
        assert told == 409
        assert "not a whole safetensors file" in answer["error"]
        (tmp_path / "two.safetensors").rename(tmp_path / "kept")
        (tmp_path / "two.safetensors").mkdir()
        assert ask("POST", "two", {"text": "x"})[0] == 409
        assert ask("DELETE", "two")[0] == 409
        (tmp_path / "two.safetensors").rmdir()
        (tmp_path / "kept").rename(tmp_path / "two.safetensors")
        assert ask("DELETE", "one")[0] == 200
        assert ask("POST", "three", {"text": "x"})[0] == 200
    with serving(examples, tiny(seed=1), tmp_path, waiting=0) as ask:
        assert ask("POST", "two", {"text": "x"})[0] == 429
    with serving(examples, tiny(seed=1), tmp_path) as ask:
        told, answer = ask("POST", "two", {"text": "x"})
        assert told == 409
        assert "another model" in answer["error"]


def test_a_session_that_is_served_is_not_removed(examples, model, tmp_path, monkeypatch):
    reading, go_on = threading.Event(), threading.Event()
    stream = model.body_stream

    def slow(*inputs):
        reading.set()
        assert go_on.wait(60)
        return stream(*inputs)

    monkeypatch.setattr(model, "body_stream", slow)
    with serving(examples, model, tmp_path) as ask, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, "POST", "a", {"text": "x", "max_new_tokens": 1})
        assert reading.wait(60)
        told, answer = ask("DELETE", "a")
        go_on.set()
        assert (told, "being served" in answer["error"]) == (409, True)
        assert asked.result()[0] == 200
        assert ask("DELETE", "a")[0] == 200


def test_a_folder_has_one_server(examples, model, tmp_path):
    _, sessions = examples
    refused = pytest.raises(sessions.Refused, match="another server uses")
    with serving(examples, model, tmp_path), refused:
        sessions.Batcher(model, 256, tmp_path, sessions.Limits())
    with serving(examples, model, tmp_path) as ask:
        assert ask("POST", "a", {"text": "x"})[0] == 200


def test_a_body_that_is_cut_is_not_read(quiet):
    ask, folder = quiet
    with socket.create_connection(("127.0.0.1", ask.port), timeout=60) as client:
        sent = b'{"text": "x"}'
        head = f"POST /sessions/cut HTTP/1.1\r\nContent-Length: {len(sent) + 9}\r\n\r\n"
        client.sendall(head.encode() + sent)
        client.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert b" 400 " in answer
    assert b"the body ends after 13 of 22 bytes" in answer
    assert not list(folder.iterdir())


def test_the_program_serves_a_saved_model_until_it_is_told_to_stop(
    examples, model, tmp_path, monkeypatch
):
    serve, _ = examples
    folder, told = tmp_path / "model", []
    tiny().float().save_pretrained(folder)

    class Watched(serve.Server):
        def serve_forever(self, *options):
            threading.Thread(target=ask_once, args=(self.server_port,)).start()
            super().serve_forever(*options)

    def ask_once(port):
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        asked = json.dumps({"text": "Call me", "max_new_tokens": 3})
        connection.request("POST", "/sessions/ada", asked)
        told.append(connection.getresponse().status)
        connection.close()
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(serve, "Server", Watched)
    words = ["serve.py", str(folder), "--sessions", str(tmp_path / "kept"), "--port", "0"]
    monkeypatch.setattr(sys, "argv", words)
    try:
        with pytest.raises(SystemExit) as ended:
            serve.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (told, ended.value.code) == ([200], 143)
    assert [file.name for file in (tmp_path / "kept").iterdir()] == ["ada.safetensors"]


def test_what_breaks_the_model_ends_the_server_and_is_said_to_whoever_waits(
    examples, model, tmp_path, monkeypatch
):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(model, "body_stream", broken)
    monkeypatch.setattr(threading, "excepthook", lambda told: None)
    with serving(examples, model, tmp_path) as ask:
        told, answer = ask("POST", "a", {"text": "x", "max_new_tokens": 1})
        assert told == 503
        assert "send it again" in answer["error"]
        assert ask("POST", "a", {"text": "x"}) == (503, {"error": "the server is stopping"})
    assert not list(tmp_path.iterdir())
