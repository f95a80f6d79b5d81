"""What the replay needs to know of pytrees: the one place that touches torch's (private) module.

A segment or a state is any nest of dicts, tuples, lists and registered dataclasses. Leaves are
tensors, or plain values (None, numbers, strings) that are stored and never differentiated.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

tree_map: Callable[..., Any] = _pytree.tree_map
tree_leaves: Callable[[Any], list[Any]] = _pytree.tree_leaves
_PLAIN = (type(None), bool, int, float, complex, str)


def is_float(leaf: Any) -> bool:
    """Whether a gradient can be taken with respect to this leaf."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def needs_grad(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def stand_in(leaf: Tensor) -> Tensor:
    """The same storage, as a fresh leaf that collects the gradient in its own `.grad`."""
    return leaf.detach().requires_grad_()


def detach(leaf: Any) -> Any:
    """Without graph; a view of something larger is copied, so that it does not pin the whole."""
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.detach()
    larger = leaf.untyped_storage().nbytes() > leaf.numel() * leaf.element_size()
    return leaf.clone() if larger else leaf


def versions(tree: Any) -> list[int]:
    """How often each tensor was edited in place; inference tensors do not count it."""
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


def leaf_name(tree: Any, index: int) -> str:
    """The path of a leaf, as in "layers.0.keys"; "" for a tree that is one leaf."""
    path, _ = _pytree.tree_flatten_with_path(tree)[0][index]
    kinds = ("key", "idx", "name")  # of a dict, a sequence, an object
    return ".".join(str(getattr(e, kind)) for e in path for kind in kinds if hasattr(e, kind))


def same_bits(a: Any, b: Any) -> bool:
    """Equality without tolerance: NaN equals itself, 0.0 differs from -0.0."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return type(a) is type(b) and a == b
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    left, right = (x.detach().reshape(-1).contiguous().view(torch.uint8) for x in (a, b))
    return torch.equal(left, right.to(left.device))


@dataclasses.dataclass(frozen=True)
class Flat:
    """A tree taken apart: its leaves in order, and what puts them together again."""

    leaves: list[Any]
    spec: Any

    @classmethod
    def of(cls, tree: Any) -> "Flat":
        return cls(*_pytree.tree_flatten(tree))

    @classmethod
    def of_state(cls, state: Any) -> "Flat":
        """As `of`; `ValueError` for a leaf that may hide tensors, whose gradient would be lost."""
        flat = cls.of(state)
        for index, leaf in enumerate(flat.leaves):
            if not isinstance(leaf, (Tensor, *_PLAIN)):
                raise ValueError(
                    f"state leaf {leaf_name(state, index)!r} is a {type(leaf).__name__}: use nested"
                    " dicts, tuples and tensors, or register the class with"
                    " torch.utils._pytree.register_dataclass"
                )
        return flat

    def tree(self, leaves: list[Any] | None = None) -> Any:
        return _pytree.tree_unflatten(self.leaves if leaves is None else leaves, self.spec)

    def map(self, fn: Callable[[Any], Any]) -> "Flat":
        return Flat([fn(leaf) for leaf in self.leaves], self.spec)
