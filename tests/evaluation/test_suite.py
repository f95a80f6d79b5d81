"""A model is asked: what it says and holds likeliest is what it would alone, in one call."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from everlong import EverlongConfig, state
from everlong.errors import UserError
from everlong.evaluation import asking, token_tasks
from everlong.evaluation.asking import Reply, ask, is_exact, named
from everlong.evaluation.codec import Codec
from everlong.evaluation.suite import Asked, choose, measure, task_names, wilson
from everlong.evaluation.token_tasks import TOKEN_TASKS, share_right
from everlong.models.hub import EverlongForCausalLM
from everlong.models.tokenizer import byte_tokenizer
from everlong.tasks.questions import Question, text_task


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    segment = {"name": "memformer", "segment_length": 8, "num_slots": 2}
    config = EverlongConfig(hidden_size=16, num_heads=2, num_layers=1, segment=segment)
    return EverlongForCausalLM(config).double().eval()


def directly(model, prompt, text):
    """Log likelihood of bytes behind a prompt, from one call without a state."""
    ids = torch.tensor([[256, *prompt.encode(), *text.encode()]])
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0].log_softmax(-1)
    size = len(text.encode())
    return float(logits[-size - 1 : -1].gather(-1, ids[0, -size:, None]).sum())


def test_replies_are_those_of_a_row_alone_in_one_call(model, monkeypatch):
    monkeypatch.setattr(asking, "BLOCK", 50)
    items = [text_task(name).item(700, 1, 2) for name in ("passkey", "updates", "babi_sim")]
    items.append(text_task("needle_multivalue").item(330, 1, 2))
    replies = ask(model, Codec(), items)
    for item, reply in zip(items, replies, strict=True):
        assert len(reply.log_likelihoods) == len(item.candidates)
        wanted = [directly(model, item.prompt, " " + word) for word in item.candidates[-2:]]
        assert np.allclose(reply.log_likelihoods[-2:], wanted, rtol=0, atol=1e-9)
        ids = torch.tensor([[256, *item.prompt.encode()]])
        size = len(item.target) + 2
        made = model.generate(ids, max_new_tokens=size, min_new_tokens=size, do_sample=False)
        assert reply.said == Codec().decode(made[0, ids.shape[1] :].numpy())
        assert reply.tokens == ids.shape[1]
        assert reply.state_bytes == state.num_bytes(model.init_state(1))


def test_a_tokenizer_of_bytes_gives_what_bytes_give(model):
    items = [text_task("updates").item(600, 0, index) for index in range(2)]
    bytes_, tokens = ask(model, Codec(), items), ask(model, Codec(byte_tokenizer()), items)
    assert bytes_ == tokens
    count = Codec(byte_tokenizer()).counter()
    assert count("ab é") == Codec().counter()("ab é") == 5


def reply(said="", nats=(), answers=("a",), candidates=("a", "b", "c"), roles=None):
    return Reply(Question("?", answers, candidates, "", roles or {}), said, tuple(nats), 1, 1)


def test_an_answer_is_all_its_words_and_nothing_else():
    assert named(" 12, 34 and 56. And 78") == ["12", "34", "56"]
    for said, right in ((" a.", True), (" a\nb", True), (" a b", False), (" ab", False)):
        assert reply(said).exact is right
    two = {"answers": ("a", "b")}
    assert reply(" b, a.", **two).exact
    assert (reply(" b, c.", **two).exact, reply(" b, c.", **two).found) == (False, 0.5)
    assert not is_exact(" a, a, b", ("a", "b"))


def test_who_holds_all_alike_is_never_right():
    assert reply(nats=(-1.0, -2.0, -3.0)).ranked
    for nats in ((-2.0, -1.0, -3.0), (-1.0, -1.0, -2.0), (float("nan"),) * 3):
        assert not reply(nats=nats).ranked
    assert reply(nats=(-1.0, -2.0, -1.5), answers=("a", "c")).ranked
    assert not reply(nats=(-1.0, -1.5, -1.5), answers=("a", "c")).ranked


def test_a_trace_is_how_much_likelier_than_what_the_text_does_not_hold():
    roles = {"b": "stale", "c": "unseen", "d": "unseen"}
    found = reply(nats=(-1.0, -2.0, -3.0, -5.0), candidates=("a", "b", "c", "d"), roles=roles)
    assert found.traces() == {"answer": 3.0, "stale": 2.0}
    assert reply(nats=(-1.0, -2.0, -3.0)).traces() == {}
    apart = reply(nats=(-1.0, -2.0, -3.0), roles={"a": "unknown", "c": "unseen"})
    assert apart.traces() == {"unknown": 2.0, "other": 1.0}


class Knowing(torch.nn.Module):
    """A stream model of bytes that has read the texts before: its state is how far it is."""

    def __init__(self, texts):
        super().__init__()
        self.texts = [[256, *text.encode(), 46] for text in texts]
        self.nothing = torch.nn.Parameter(torch.zeros(1))
        self.config = EverlongConfig()

    def init_state(self, batch_size):
        return {"row": torch.arange(batch_size), "at": torch.zeros(batch_size).long()}

    def advance(self, ids, held, mask=None):
        return self.stream(ids, held, mask)[1]

    def stream(self, ids, held, mask=None):
        lengths = torch.full_like(held["at"], ids.shape[1]) if mask is None else mask.sum(1)
        logits = torch.zeros(*ids.shape, 259)
        for row, (text, at) in enumerate(zip(held["row"], held["at"], strict=True)):
            for t in range(ids.shape[1]):
                known = self.texts[text][: at + t + 2]
                logits[row, t, known[-1]] = 9.0
        return logits, {"row": held["row"], "at": held["at"] + lengths}


def test_who_knows_the_answers_has_them_all_right_and_who_knows_old_ones_is_seen():
    task = text_task("updates")
    items = [task.item(699, 0, index) for index in range(20)]
    asked = Asked((700,), samples=20, batch_size=20)

    def rows(target):
        knowing = Knowing([item.prompt + target(item) for item in items])
        return {row["group"]: row for row in measure(knowing, Codec(), "updates", asked)}

    right = rows(lambda item: item.target)
    assert list(right) == [None, *task.groups]
    assert all(row["exact"] == row["ranked"] == row["found"] == 1 for row in right.values())
    assert right[None]["first_by_role"] == {"answer": 1}
    assert right["deleted"]["samples"] == 2

    def old(item):
        past = [w for w in item.candidates if item.role(w) in ("stale", "erased")]
        return " " + past[0] if past else item.target

    late = rows(old)
    assert late["told 0-25 % back"]["exact"] == 1
    for group, role in (("rewritten 4 times", "stale"), ("deleted", "erased")):
        assert late[group]["exact"] == late[group]["ranked"] == 0
        assert late[group]["first_by_role"] == {role: 1}
        assert late[group]["trace_by_role"][role] > 5


def test_rows_say_what_is_missing_and_how_many_bytes_are_held(model):
    small = model.float()
    asked = Asked((64, 300), samples=3, batch_size=2)
    short, *long = measure(small, Codec(), "passkey", asked)
    assert short == {"task": "passkey", "length": 64, "group": None, "missing": short["missing"]}
    assert short["missing"].startswith("needs ")
    assert long[0]["samples"] == sum(row["samples"] for row in long[1:]) == 3
    assert 200 < long[0]["tokens"][0] <= long[0]["tokens"][1] <= 300
    assert long[0]["state_bytes"] == state.num_bytes(small.init_state(1))
    (row,) = measure(small, Codec(), "pair_streams", Asked((3000,), samples=1))
    assert row["missing"] == "has 1016 ids, and the model 259"
    (row,) = measure(small, Codec(), "mqar", Asked((8,), samples=1))
    assert "length is 8" in row["missing"]


@pytest.mark.parametrize("name", TOKEN_TASKS)
def test_token_tasks_are_scored_as_their_batches_do(name, model, monkeypatch):
    monkeypatch.setattr(token_tasks, "BLOCK", 7)
    task, small = TOKEN_TASKS[name], model.float()
    config = task.config(48)
    batch = task.make_batch(config, 0, range(5))
    shares, length, _ = share_right(small, batch)
    assert length == int(batch.mask.sum(1).max()) in range(40, 49)
    with torch.no_grad():
        logits, _ = small.stream(batch.inputs, None, batch.mask)
    correct = batch.correct(logits).float().view(5, -1).mean(1)
    assert torch.allclose(torch.tensor(shares), correct)


def test_intervals_are_those_of_wilson():
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)
    assert wilson(1, 20) == pytest.approx((0.8389, 1), abs=1e-4)
    assert wilson(1, 40)[1] == 1
    assert wilson(0, 40)[0] == 0
    widths = [high - low for low, high in (wilson(0.3, n) for n in (5, 50, 500))]
    assert all(a > b for a, b in pairwise(widths))


def test_names_and_numbers_are_checked():
    known = task_names()
    assert choose(["needle_*", "needle_single", "mqar"], known)[-1] == "mqar"
    assert len(choose(["needle_*", "needle_single"], known)) == 5
    with pytest.raises(UserError, match="no task 'mqra'; did you mean 'mqar'.*tasks: .*tracing"):
        choose(["mqra"], known)
    for options, message in (
        ({"lengths": ()}, "give lengths of 1 or more"),
        ({"lengths": (5, 5)}, "give each of them once"),
        ({"samples": 0}, "samples is 0: give 1 or more"),
        ({"seed": -1}, "seed is -1: give 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            Asked(**options)
