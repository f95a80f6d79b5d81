"""Two processes: the averaged gradient is that of the joined batch, from one all-reduce round."""

import torch
import torch.multiprocessing

import everlong
from training.replay_toys import difference
from training.replay_workers import ROWS, WORLD, make, worker


def test_data_parallel(tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=WORLD)
    toy, segments = make(slice(None))
    everlong.replay(toy, segments, toy.init_state(WORLD * ROWS))
    expected = {name: parameter.grad for name, parameter in toy.named_parameters()}
    for rank in range(WORLD):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found["rounds"] == [1, 1, 1]
        for result in found["results"]:
            assert difference(expected, result) <= 1e-12
    assert min(value.abs().max() for value in expected.values()) > 1e-4
