"""How the gradients of our autograd Functions are taken."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a Function's `backward`: of first order only, and outside autocast, as its forward
    is, also where the caller calls backward() under it."""

    @wraps(backward)
    def exactly(ctx: Any, *grads: Any) -> Any:
        with torch.autocast(grads[0].device.type, enabled=False):
            return backward(ctx, *grads)

    return once_differentiable(exactly)
