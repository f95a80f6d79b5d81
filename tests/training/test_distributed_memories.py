"""Two processes with every memory do what one does: one launch, whose findings tests look at."""

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file

from models.hub_models import every_model
from training import memories_workers as workers
from training.distributed_workers import WORLD
from training.memories_workers import NAMES, WITHOUT

pytestmark = pytest.mark.benchmark  # 40 seconds; what they ask of memformer, test_distributed asks
OWN = pytest.mark.xfail(
    reason="its own loss is a mean over a process's rows; without it the gradients are equal"
)
each_loss = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[OWN] if n + WITHOUT in NAMES else []) for n in NAMES]
)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """By memory: gradients of one process in both rollouts and where it goes on from two processes'
    checkpoint; and those of each of two processes."""
    folder = tmp_path_factory.mktemp("memories")
    one = {name: workers.alone(name, folder / name / "one") for name in NAMES}
    torch.multiprocessing.spawn(workers.worker, (str(folder),), nprocs=WORLD)
    later = {name: workers.resumed(name, folder / name / "two") for name in NAMES}
    two = {n: [load_file(folder / n / f"gradients-{r}") for r in range(WORLD)] for n in NAMES}
    return one, two, later


def close(found, wanted):
    assert max(grad.abs().max() for grad in wanted.values()) > 1e-3
    assert found.keys() == wanted.keys(), "what no row reaches has no gradient"
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=0, atol=1e-9, msg=name)


def of(tensors, kind):
    return {n.removeprefix(f"{kind}."): t for n, t in tensors.items() if n.startswith(f"{kind}.")}


@pytest.mark.supports("processes: gradients")
@each_loss
def test_two_processes_have_the_gradients_of_one(launched, name):
    one, two, _ = launched
    for tensors in two[name]:
        close(of(tensors, "plain"), one[name][0])


@pytest.mark.supports("processes: shares")
@each_loss
def test_in_shares_too(launched, name):
    one, two, _ = launched
    for tensors in two[name]:
        close(of(tensors, "shares"), one[name][0])


@pytest.mark.supports("processes: another number")
@every_model
def test_another_number_of_processes_goes_on_from_a_checkpoint(launched, name):
    one, two, later = launched
    close(later[name], one[name][1])
    for tensors in two[name]:
        close(of(tensors, "resumed"), one[name][1])
