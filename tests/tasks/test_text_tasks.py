"""What is true of every text task, and that who reads the text can answer all of them."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from everlong.tasks import _words, babi_sim, needles, updates, word_counts
from everlong.tasks.questions import (
    DEPTHS,
    Frame,
    TooShort,
    list_tasks,
    num_bytes,
    register_task,
    sentences,
    spread,
    text_task,
)

NAMES = list_tasks()
LENGTH = 900


def words(text):
    return len(text.split())


def read_passkey(text):
    return re.findall(r"The pass key is (\d+)\.", text)


def read_needles(text):
    told, question = text.rsplit("What ", 1)
    asked = re.findall(r"the (\w+ \w+)(?= and|\?)", question)
    found = re.findall(r"The number of the (\w+ \w+) is (\d+)\.", told)
    return [value for name, value in found if name in asked]


def read_updates(text):
    known = {}
    for name, code, lost in re.findall(
        r"code of the (\w+ \w+) is(?: now)? (\d+)\.|Forget the code of the (\w+ \w+)\.", text
    ):
        known[name or lost] = code or "unknown"
    return [known.get(re.search(r"What is the code of the (\w+ \w+)\?", text)[1], "unknown")]


def read_babi(text):
    at, holder, seen = {}, {}, {}
    for who, verb, what in re.findall(
        r"([A-Z]\w+) (walks to|picks up|puts down) the (\w+)\.", text
    ):
        if verb == "walks to":
            at[who] = what
            for thing in (thing for thing, hand in holder.items() if hand == who):
                seen[thing].append(what)
        elif verb == "picks up":
            holder[what] = who
            seen.setdefault(what, [at[who]])
        else:
            assert holder.pop(what) == who
    if found := re.search(r"Where is ([A-Z]\w+)\?", text):
        return [at[found[1]]]
    if found := re.search(r"Where is the (\w+)\?", text):
        return [seen[found[1]][-1]]
    if found := re.search(r"Where was the (\w+) before the (\w+)\?", text):
        return [seen[found[1]][seen[found[1]].index(found[2]) - 1]]
    if found := re.search(r"Is (\w+) in the (\w+)\?", text):
        return ["yes" if at[found[1]] == found[2] else "no"]
    found = re.search(r"How many things does (\w+) hold\?", text)
    return [babi_sim.HELD[list(holder.values()).count(found[1])]]


def read_tracing(text):
    known = {}
    for name, given in re.findall(r"Let (\w+) be (\w+)\.", text):
        known[name] = known.get(given, given)
    asked = re.search(r"value (\d+)\?", text)[1]
    return [name for name, value in known.items() if value == asked]


def read_words(text):
    listed = text.split("Words: ")[1].split(" Which")[0].split()
    return [word for word, _ in Counter(listed).most_common(3)]


READERS = {
    "passkey": read_passkey,
    "updates": read_updates,
    "babi_sim": read_babi,
    "tracing": read_tracing,
    "common_words": read_words,
    "frequent_words": read_words,
} | {name: read_needles for name in NAMES if name.startswith("needle_")}


@pytest.mark.parametrize("name", NAMES)
def test_who_reads_the_text_answers_and_items_are_what_they_should_be(name):
    task, groups = text_task(name), set()
    for index in range(60):
        item = task.item(LENGTH, 3, index)
        assert sorted(READERS[name](item.prompt)) == sorted(item.answers), item.prompt
        assert LENGTH - 300 < num_bytes(item.prompt) <= LENGTH
        assert item.prompt == item.prompt.strip()
        assert len(set(item.candidates)) == len(item.candidates) > len(item.answers)
        assert set(item.answers) < set(item.candidates)
        assert set(item.roles) <= set(item.candidates)
        assert all(item.role(word) == "answer" for word in item.answers)
        for word in item.candidates:
            assert not any(other != word and other.startswith(word) for other in item.candidates)
            if item.role(word) == "unseen":
                assert word not in item.prompt
        groups.add(item.group)
    assert groups == set(task.groups)


@pytest.mark.parametrize("name", NAMES)
def test_items_are_functions_of_config_seed_and_index(name):
    task = text_task(name)
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    assert task.item(LENGTH, 5, 3) == task.item(LENGTH, 5, 3)
    others = [task.item(LENGTH, 5, 13), task.item(LENGTH, 6, 3), task.item(LENGTH + 200, 5, 3)]
    assert all(other.prompt != task.item(LENGTH, 5, 3).prompt for other in others)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


@pytest.mark.parametrize("name", NAMES)
def test_the_least_length_is_the_least(name):
    task = text_task(name)
    for count, index in ((num_bytes, 0), (words, 6)):
        needed = task.needed(0, index, count)
        assert count(task.item(needed, 0, index, count).prompt) <= needed
        with pytest.raises(TooShort, match=f"this item needs {needed} tokens"):
            task.item(needed - 1, 0, index, count)


def test_lengths_are_counted_as_they_are_told_to():
    for name in NAMES:
        item = text_task(name).item(400, 0, 1, words)
        assert 370 < words(item.prompt) <= 400
        assert sorted(READERS[name](item.prompt)) == sorted(item.answers)


def test_facts_stand_at_their_places_in_order():
    facts = [(1, "Last."), (0.5, "Then."), (0, "First."), (0.5, "And then.")]
    filler = iter(["one", "two", "three", "four", "a sentence too long to have room"])
    frame = Frame("Begin.", "End?")
    length = num_bytes("Begin. First. one two Then. And then. three four Last. End?") + 10
    text = spread(length, frame, facts, filler, num_bytes)
    assert text == "Begin. First. one two Then. And then. three four Last. End?"


@pytest.mark.parametrize("length", [200, 512, 4000])
def test_a_depth_is_where_the_fact_stands(length):
    for index in range(40):
        item = text_task("passkey").item(length, 3, index)
        before, after = item.prompt.split(f" The pass key is {item.answers[0]}.")
        before = before.removeprefix("There is a pass key in this text: remember it.")
        after = after.removesuffix("What is the pass key? The pass key is")
        if len(before) + len(after) > 1:
            share = (len(before) + 1) / (len(before) + len(after) + 1)
            assert item.group == DEPTHS[min(int(4 * share), 3)]


def test_what_there_are_too_few_of_is_said(monkeypatch):
    make, config = text_task("passkey").make_item, text_task("passkey").config
    with pytest.raises(ValueError, match="90 have 2 digits: raise digits"):
        make(replace(config, digits=2, num_candidates=90), 0, 0)
    monkeypatch.setattr(word_counts, "COINED", 100)
    with pytest.raises(ValueError, match="there are 100 words, which end before 4096 tokens"):
        text_task("common_words").item(4096, 0, 0)


def test_prose_holds_no_numbers():
    item = text_task("passkey")
    config = replace(item.config, length=60_000, digits=2, filler="prose")
    prompt = item.make_item(config, 0, 0).prompt
    assert len(re.findall(r"[0-9]+", prompt)) == 1


def test_fillers():
    generator = np.random.default_rng(0)
    plain = sentences("plain", generator)
    lists = _words.NAMES + _words.PLACES + _words.OBJECTS + _words.ADJECTIVES + _words.THINGS
    assert len(set(lists)) == len(lists)
    for _ in range(300):
        text = next(plain)
        assert not set(re.findall(r"\w+", text)) & set(lists)
    prose = text_task("passkey")
    config = type(prose.config)(length=2000, filler="prose")
    item = prose.make_item(config, 0, 0)
    assert read_passkey(item.prompt) == list(item.answers)
    assert "the" in item.prompt
    assert item.prompt != prose.make_item(config, 0, 1).prompt
    with pytest.raises(ValueError, match="filler is 'prosa'.*did you mean 'prose'"):
        type(prose.config)(filler="prosa")


def test_a_crowd_is_made_of_needles_of_others():
    item = text_task("needle_crowd").item(3000, 0, 0)
    told = re.findall(r"The number of the (\w+ \w+) is (\d+)\.", item.prompt)
    assert len(told) > 50
    assert item.answers[0] in dict(told).values()
    unseen = {word for word in item.candidates if item.role(word) == "unseen"}
    assert not unseen & {value for _, value in told}


def test_updates_say_what_is_stale_and_what_was_erased():
    task = text_task("updates")
    for index, group in enumerate(updates.GROUPS):
        item = task.item(1200, 1, index)
        ages = updates.GROUPS[:4]  # that of the text, which may be the next to that drawn
        assert item.group == group or {item.group, group} <= set(ages)
        roles = Counter(item.role(word) for word in item.candidates)
        assert roles["unseen"] == 4
        assert roles["other"] == 3
        stale = {"rewritten 1 time": 1, "rewritten 2 times": 2, "rewritten 4 times": 4}
        assert roles["stale"] == (1 if group == "contradicted" else stale.get(group, 0))
        assert roles["erased"] == (group == "deleted")
        assert (item.answers == ("unknown",)) == (group in ("deleted", "never told"))


def test_ages_are_what_groups_say():
    task = text_task("updates")
    for index in range(40):
        item = task.item(6000, 2, 10 * index + index % 4)
        back = 1 - item.prompt.index(item.answers[0]) / len(item.prompt)
        low, high = map(int, re.findall(r"(\d+)-(\d+)", item.group)[0])
        assert low - 5 <= 100 * back <= high + 5


def test_chance_is_that_of_a_random_order():
    item = text_task("needle_multiquery").item(LENGTH, 0, 0)
    assert item.chance == pytest.approx(4 / 10 * 3 / 9 * 2 / 8 * 1 / 7)
    assert text_task("updates").item(LENGTH, 0, 0).chance == pytest.approx(1 / 9)
    yes = [text_task("babi_sim").item(LENGTH, 0, i).answers == ("yes",) for i in range(3, 400, 5)]
    assert 0.3 < np.mean(yes) < 0.7


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (needles.NeedlesConfig, {"num_queries": 2}, "num_queries is 2: give at most num_things, 1"),
        (needles.NeedlesConfig, {"num_values": 10}, "num_candidates is 10: give more"),
        (needles.NeedlesConfig, {"num_things": 0}, "num_things is 0: give 1 or more"),
        (needles.NeedlesConfig, {"num_things": 500}, "there are not so many words"),
        (updates.UpdatesConfig, {"num_unseen": 0}, "num_unseen is 0: give 1 or more"),
        (babi_sim.BabiSimConfig, {"num_places": 1}, "num_places is 1: give 2 or more"),
        (babi_sim.BabiSimConfig, {"num_people": 99}, "num_people is more than 20"),
    ],
)
def test_impossible_options_are_refused(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_names_are_found_suggested_and_not_taken_twice():
    assert set(READERS) == set(NAMES)
    with pytest.raises(ValueError, match="unknown task 'pasky'; did you mean 'passkey'"):
        text_task("pasky")
    with pytest.raises(ValueError, match="the name 'passkey' is taken by everlong.tasks.passkey"):
        register_task("passkey", read_passkey, None, (), "nothing")


def test_the_page_shows_every_task():
    rows = []
    for task in map(text_task, NAMES):
        groups = "by depth" if task.groups == DEPTHS else ", ".join(task.groups)
        rows.append(f"| `{task.name}` | {task.about} | {groups} |\n")
    page = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text()
    shown = re.search(r"<!-- tasks -->\n.*\n.*\n((?:.*\n)*)<!-- /tasks -->", page)
    assert shown[1] == "".join(rows)
