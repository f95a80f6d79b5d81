"""Several processes as one: each has its rows of the batch, and the first one writes.

`torchrun` or `accelerate launch` starts them and accelerate's `PartialState` knows which this one
is; of a single process everything here is the plain thing, without an exchange.
"""

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather, pad_across_processes
from torch import Tensor, nn

from everlong.errors import UserError
from everlong.state import State

T = TypeVar("T")

_BUCKET = 1 << 25  # numbers in one exchange: what is copied beside the gradients stays below this


def group_of(device: str) -> PartialState:
    """The processes that train together, for a `train.device`: without CUDA they exchange on the
    CPU. `UserError` where they would not know of each other."""
    several = int(os.environ.get("WORLD_SIZE") or 1) > 1
    without = several and device == "auto" and not torch.cuda.is_available()
    group = PartialState(cpu=device == "cpu" or without)
    if several and group.num_processes == 1:
        raise UserError(
            f"several processes were started, and on device {device!r} each would train alone: "
            "give --device cpu, or start one"
        )
    return group


def rows_of(batch_size: int, group: PartialState) -> slice:
    """The rows of the batch that this process reads; `UserError` where they do not divide."""
    rows, left = divmod(batch_size, group.num_processes)
    if left:
        raise UserError(
            f"batch_size {batch_size} does not divide among {group.num_processes} processes: "
            "give a multiple of their number, or start another number"
        )
    return slice(group.process_index * rows, (group.process_index + 1) * rows)


def from_main(group: PartialState, work: Callable[[], T]) -> T:
    """`work()`, done by the main process alone: all get its result, or raise its `UserError`.

    The result is plain data. Every process must call it.
    """
    if group.num_processes == 1:
        return work()
    sent: list[Any] = [None, None]
    if group.is_main_process:
        try:
            sent[0] = work()
        except UserError as error:
            sent[1] = error
    broadcast_object_list(sent)
    result, failed = sent
    if failed is not None:
        raise failed
    return result


def copy_from_main(tensors: Sequence[Tensor]) -> None:
    """All processes' tensors become those of the main one, in place."""
    for tensor in tensors:
        dist.broadcast(tensor, src=0)


def sum_in_place(tensors: Sequence[Tensor]) -> None:
    """Over all processes, in one exchange for every 2^25 numbers of a dtype."""
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        dist.all_reduce(flat)
        sizes = [tensor.numel() for tensor in bucket]
        for tensor, part in zip(bucket, flat.split(sizes), strict=True):
            tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        bucket: list[Tensor] = []
        for tensor in tensors:
            if tensor.dtype != dtype:
                continue
            if bucket and sum(each.numel() for each in (*bucket, tensor)) > _BUCKET:
                yield bucket
                bucket = []
            bucket.append(tensor)
        yield bucket


def sum_of_numbers(*numbers: float) -> list[float]:
    """Each over all processes."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, numbers)
    return [math.fsum(each) for each in zip(*gathered, strict=True)]


def gather_rows(state: State) -> State:
    """The state of all processes' rows, in the order of the batch.

    States that grow may have grown to different lengths: the shorter end in zeros, as they do where
    rows of one process differ.
    """
    return gather(pad_across_processes(state, dim=1))


def leave(group: PartialState) -> None:
    """End the process group: what comes after is this process's own business."""
    if group.num_processes > 1:
        group.destroy_process_group()
        PartialState._reset_state()


def sum_gradients(
    parameters: Sequence[nn.Parameter],
    more: Sequence[Tensor] = (),
    reached: Sequence[bool] | None = None,
) -> None:
    """Gradients, and `more` with them, become everyone's sum, in place and in one exchange.

    What nobody's rows reached has no gradient, as in one process: the optimiser leaves it alone.
    `reached`: which parameters this process's rows did, where the gradients themselves are summed
    already.
    """
    gradients: list[Tensor] = []
    if reached is None:
        reached = add_missing_gradients(parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
    first = [*more, *gradients][0]
    times = torch.tensor(reached, device=first.device).to(first.dtype)
    sum_in_place([*gradients, *more, times])
    if not all(reached):
        for parameter, number in zip(parameters, times.tolist(), strict=True):
            if number == 0:
                parameter.grad = None


def add_missing_gradients(parameters: Sequence[nn.Parameter]) -> list[bool]:
    """Zeros where this process's rows did not reach a parameter: others' may have. Returns which
    were reached."""
    reached = [parameter.grad is not None for parameter in parameters]
    for parameter, has in zip(parameters, reached, strict=True):
        if not has:
            parameter.grad = torch.zeros_like(parameter)
    return reached


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that lies in shares; every process must call it. Any other, as it is."""
    collect = getattr(tensor, "full_tensor", None)
    return tensor if collect is None else collect()


_CALLS = ("stream", "advance", "body_stream", "init_state", "reset")


class Sharded:
    """A model in shares (FSDP2): of weights, gradients and optimiser each process keeps its own.

    It has the stream methods of the model. The first call of a step collects the weights, and
    `share_gradients` behind the last backward sums the gradients and lets the weights go again:
    one exchange of either a step, however many segments were read or replayed in between, and
    however many of them each process had. Between, one process holds all weights and gradients.

    The model itself stays whole, on the CPU, with the weights it had at the last `collect`.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        scalars = [name for name, p in model.named_parameters() if p.ndim == 0]
        if scalars:
            raise UserError(f"{scalars[0]} is a single number, not to be shared: leave out shard")
        self.model, self.device = model, device
        self._inner = copy.deepcopy(model).to(device)
        marks = [dict(vars(parameter)) for parameter in model.parameters()]
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        self._root: Any = fully_shard(_Calls(self._inner), mesh=mesh, reshard_after_forward=False)
        for parameter, mark in zip(self._inner.parameters(), marks, strict=True):
            vars(parameter).update(mark)  # such as _no_weight_decay
        self._root.set_gradient_divide_factor(1.0)  # losses are weighted by all targets: sum
        self._root.set_force_sum_reduction_for_comms(True)
        self._hold(True)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return partial(self._call, name) if name in _CALLS else found

    def _call(self, method: str, *inputs: Any, **options: Any) -> Any:
        with warnings.catch_warnings():  # of views edited in place later: a state never is
            warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
            return self._root(method, *inputs, **options)

    def _hold(self, held: bool) -> None:
        """Whether a backward leaves weights and gradients where they are, or shares them out."""
        self._root.set_requires_gradient_sync(not held)
        self._root.set_reshard_after_backward(not held)

    def share_gradients(self) -> list[bool]:
        """Each process gets the sum over all of its share. An empty backward with hooks does it.

        Returns which parameters this process's rows reached."""
        trained = [p for p in self._inner.parameters() if p.requires_grad]
        reached = add_missing_gradients(trained)
        self._hold(False)
        self._call("", torch.zeros((), device=self.device, requires_grad=True)).backward()
        self._hold(True)
        return reached

    @torch.no_grad()
    def collect(self) -> None:
        """The weights into the whole model. Every process must call it."""
        self._root.reshard()
        for target, share in self._pairs():
            target.copy_(whole(share))

    @torch.no_grad()
    def deal(self) -> None:
        """The whole model's weights into the shares."""
        self._root.reshard()
        for source, share in self._pairs():
            share.copy_(self.like(source, share))

    def like(self, value: Tensor, share: Tensor) -> Tensor:
        """This process's part of `value`, shared out as `share` is; whole where that is whole."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        if not isinstance(share, DTensor) or value.shape != share.shape:
            return value
        value = value.to(self.device)
        layout = share.device_mesh, share.placements
        return distribute_tensor(value, *layout, src_data_rank=None)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for kind in ("parameters", "buffers"):
            yield from zip(getattr(self.model, kind)(), getattr(self._inner, kind)(), strict=True)


class _Calls(nn.Module):
    """Any method of a model through `forward`, which FSDP surrounds with its exchanges."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, method: str, *inputs: Any, **options: Any) -> Any:
        return getattr(self.model, method)(*inputs, **options) if method else inputs[0] * 1
