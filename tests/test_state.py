"""States are values: nested, batch first, saved and loaded to the same bits."""

import pytest
import torch
from safetensors.torch import save_file

from everlong import state as states


def example(rows: int = 3, length: int = 4) -> dict:
    generator = torch.Generator().manual_seed(rows)
    return {
        "layers": (
            {"keys": torch.randn(rows, length, 2, generator=generator)},
            torch.randn(rows, 5, generator=generator).double(),
        ),
        "position": torch.arange(rows),
        "mask": torch.arange(rows) % 2 == 0,
    }


def same(a: object, b: object) -> bool:
    a, b = states.flatten(a), states.flatten(b)
    return list(a) == list(b) and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


def test_flatten_names_leaves_by_path_in_order_of_structure():
    state = example()
    found = states.flatten(state)
    assert list(found) == ["layers.0.keys", "layers.1", "position", "mask"]
    assert all(a is b for a, b in zip(found.values(), states.leaves(state), strict=True))
    assert list(states.flatten(torch.ones(2))) == [""]


@pytest.mark.parametrize("wrong", [None, 3, [torch.ones(2)], {"a": None}, (torch.ones(1), 2.0)])
def test_only_dicts_tuples_and_tensors(wrong):
    with pytest.raises(ValueError, match="dicts, tuples and tensors only"):
        states.flatten(wrong)
    with pytest.raises(ValueError, match="dicts, tuples and tensors only"):
        states.tree_map(lambda leaf: leaf, wrong)


def test_tree_map_keeps_structure_and_takes_others_along():
    state = example()
    total = states.tree_map(lambda a, b: a.double() + b, state, state)
    assert isinstance(total["layers"], tuple)
    assert torch.equal(total["layers"][1], 2 * state["layers"][1])


def test_states_of_different_structure_are_refused():
    state = example()
    for other in ({**state, "more": torch.ones(3)}, {**state, "layers": ()}, torch.ones(3)):
        with pytest.raises(ValueError, match="states differ"):
            states.tree_map(torch.add, state, other)


def test_num_bytes_and_batch_size():
    assert states.num_bytes(example()) == 3 * 4 * 2 * 4 + 3 * 5 * 8 + 3 * 8 + 3
    assert states.batch_size(example(7)) == 7
    expanded = {"start": torch.ones(1, 6).expand(4, -1)}
    assert states.num_bytes(expanded) == 4 * 6 * 4  # what must be kept, not what is stored now


def test_detach_cuts_the_graph_and_only_that():
    leaf = torch.ones(2, 3, requires_grad=True)
    state = {"a": leaf * 2, "b": torch.arange(2)}
    cut = states.detach(state)
    assert not cut["a"].requires_grad
    assert state["a"].requires_grad
    assert same(cut, state)


def test_to_casts_floating_leaves_only():
    got = states.to(example(), dtype=torch.bfloat16)
    assert [leaf.dtype for leaf in states.leaves(got)] == [
        torch.bfloat16,
        torch.bfloat16,
        torch.int64,
        torch.bool,
    ]
    assert same(states.to(example(), device="cpu"), example())


def test_select_reorders_and_repeats():
    state = example()
    got = states.select(state, torch.tensor([2, 0, 2, 1]))
    assert got["position"].tolist() == [2, 0, 2, 1]
    assert torch.equal(got["layers"][0]["keys"][2], state["layers"][0]["keys"][2])


def test_where_chooses_row_by_row():
    a, b = example(), states.tree_map(torch.zeros_like, example())
    got = states.where(torch.tensor([True, False, True]), a, b)
    for leaf, x in zip(states.leaves(got), states.leaves(a), strict=True):
        assert torch.equal(leaf[::2], x[::2])
        assert not leaf[1].any()


def test_where_is_a_choice_not_an_average():
    rows = torch.tensor([True, False])
    a, b = torch.tensor([[1.0], [torch.nan]]), torch.tensor([[torch.inf], [2.0]])
    assert states.where(rows, a, b).tolist() == [[1.0], [2.0]]


def test_cat_and_split_are_inverse():
    state = example()
    rows = states.split(state)
    assert len(rows) == 3
    assert same(states.cat(rows), state)
    rows[0]["position"].add_(100)
    assert state["position"].tolist() == [0, 1, 2], "a row shares memory with the batch"
    assert rows[0]["layers"][1].untyped_storage().nbytes() == 5 * 8, "a row pins the batch"


def test_states_that_grew_to_different_lengths_are_padded_with_zeros():
    short, long = example(2, 3), example(1, 6)
    got = states.cat([short, long])["layers"][0]["keys"]
    assert got.shape == (3, 6, 2)
    assert torch.equal(got[:2, :3], short["layers"][0]["keys"])
    assert not got[:2, 3:].any()
    other = example(2, 5)
    chosen = states.where(torch.tensor([True, False]), short, other)["layers"][0]["keys"]
    assert torch.equal(chosen[1], other["layers"][0]["keys"][1])
    assert not chosen[0, 3:].any()


def test_states_of_different_memories_cannot_be_joined():
    a, b = {"slots": torch.ones(2, 3, 4)}, {"slots": torch.ones(2, 3, 5)}
    with pytest.raises(ValueError, match="different memories"):
        states.cat([a, b])


def test_nothing_changes_its_arguments():
    state, other = example(), example()
    rows = torch.tensor([True, False, True])
    states.where(rows, state, states.tree_map(torch.zeros_like, state))
    states.select(state, torch.tensor([1, 1, 1]))
    states.to(state, dtype=torch.float16)
    states.cat([state, state])
    assert same(state, other)


@pytest.mark.parametrize("state", [example(), (torch.ones(2, 1),), torch.ones(2, 3)])
def test_save_and_load_give_the_same_bits(state, tmp_path):
    path = tmp_path / "state.safetensors"
    states.save(state, path, "toy", "abc")
    loaded = states.load(path, "toy", "abc")
    assert same(loaded, state)
    assert type(loaded) is type(state)
    assert same(states.load(path), state)
    assert [each.name for each in tmp_path.iterdir()] == [path.name], "a partial file remains"


def test_views_and_graphs_are_saved_as_values(tmp_path):
    whole = torch.randn(4, 6, requires_grad=True)
    state = {"a": whole[:2], "b": whole[:2], "c": whole.t()[:2], "d": whole[:1].expand(2, -1)}
    states.save(state, tmp_path / "state")
    assert same(states.load(tmp_path / "state"), states.detach(state))


def test_a_state_of_another_model_is_refused(tmp_path):
    states.save(example(), tmp_path / "state", "memformer", "abc")
    with pytest.raises(ValueError, match=r"memory is 'memformer', this one's 'rmt'"):
        states.load(tmp_path / "state", "rmt")
    with pytest.raises(ValueError, match=r"config_hash is 'abc', this one's 'abd'"):
        states.load(tmp_path / "state", "memformer", "abd")
    with pytest.raises(ValueError, match="config_hash"):
        states.load(tmp_path / "state", config_hash="abd")
    with pytest.raises(ValueError, match="memory is"):
        states.load(tmp_path / "state", name="")


def test_a_damaged_or_foreign_file_is_refused(tmp_path):
    path = tmp_path / "state"
    states.save(example(), path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        states.load(path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="not an everlong state"):
        states.load(path)
    with pytest.raises(FileNotFoundError):
        states.load(tmp_path / "none")


def test_a_changed_bit_is_seen_wherever_it_is(tmp_path):
    path = tmp_path / "state"
    states.save(example(), path)
    whole = path.read_bytes()
    places = range(0, len(whole), 3)
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="damaged|not a whole|not an everlong state"):
            states.load(path)
    path.write_bytes(whole)
    states.load(path)


def test_a_failed_save_leaves_the_file_before_it(tmp_path):
    path = tmp_path / "state"
    states.save(example(), path)
    with pytest.raises(ValueError, match="tensors only"):
        states.save({**example(), "bad": None}, path)
    assert same(states.load(path), example())
    assert len(list(tmp_path.iterdir())) == 1


def test_pad_length_adds_zeros_and_never_cuts():
    leaf = torch.ones(2, 3, 1)
    assert states.pad_length(leaf, 2) is leaf
    assert states.pad_length(leaf, 5).sum(1).tolist() == [[3.0], [3.0]]


def test_a_key_with_a_dot_is_refused():
    with pytest.raises(ValueError, match="joined by dots"):
        states.flatten({"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}})
