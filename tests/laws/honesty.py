"""Law 9: what cannot be meant is refused with a remedy. (Warnings are errors in every test.)"""

from collections.abc import Callable
from typing import Any

import torch

from laws.cases import Case


def _refused(call: Callable[[], Any], what: str, *words: str) -> None:
    """`call` raises `ValueError` whose message holds the words."""
    try:
        call()
    except Exception as error:
        if not isinstance(error, ValueError):
            raise AssertionError(f"{what} raised {error!r} instead of a ValueError") from error
        missing = [word for word in words if word not in str(error)]
        if missing:
            raise AssertionError(f"{what}: {missing} not in the message {str(error)!r}") from error
    else:
        raise AssertionError(f"{what} was accepted")


def check_options(case: Case) -> None:
    """Unknown options get a suggestion; sizes that no tensor has are refused."""
    if case.create is None:
        return
    create = case.create
    _refused(lambda: create(hidden_sise=24), "hidden_sise=", "hidden_size")
    _refused(lambda: create(no_such_option_at_all=1), "an unknown option", "no_such_option_at_all")
    for key in ("hidden_size", "num_heads"):
        for value in (0, -1):
            _refused(lambda k=key, v=value: create(**{k: v}), f"{key}={value}", key)
    try:
        odd = create(hidden_size=24, num_heads=5)
    except ValueError:
        return
    odd(torch.randn(1, 3, 24))  # 5 heads of 24 / 5: refused at once, or it works


def check_shapes(case: Case) -> None:
    """Inputs, masks, states and rows that do not fit are refused, not broadcast."""
    memory = case.build()
    x = case.inputs(2, 3)
    _, state = memory(x)
    bad_masks = (torch.ones(2, 4), torch.ones(1, 3), torch.ones(3, 2), torch.ones(2, 3, 1))
    for mask in bad_masks:
        _refused(lambda m=mask: memory(x, None, m), f"a mask {list(mask.shape)}", "mask")
    _refused(lambda: memory(case.inputs(3, 3), state), "3 rows after a state of 2", "rows")
    _refused(lambda: memory(x[:, :0]), "a call without a position")
    _refused(lambda: memory(x[0, 0]), "an input without time")
    _refused(lambda: memory.reset(state, torch.ones(3).bool()), "reset of 3 rows of 2", "rows")
    _refused(lambda: memory.reset(state, torch.tensor([0, 1])), "reset by index", "rows")
    if not case.tokens:
        for width in (case.width + 1, case.width // 2):
            wide = torch.zeros(2, 3, width, dtype=torch.float64)
            _refused(lambda w=wide: memory(w), f"width {width} for {case.width}", "hidden_size")
