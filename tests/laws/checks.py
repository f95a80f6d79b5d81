"""Every law as checks on a Case; a check raises AssertionError where the law is broken."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from laws.bounds import (
    check_bounded,
    check_detached,
    check_form,
    check_owned,
    check_pure,
    check_quiet,
)
from laws.cases import Case
from laws.honesty import check_options, check_shapes
from laws.numbers import check_accumulators, check_far, check_precision, check_saved
from laws.replays import check_advance, check_checkpoint, check_replay, check_truncation
from laws.rows import (
    check_mask,
    check_mask_kinds,
    check_masked_row,
    check_reset,
    check_row_alone,
    check_served,
)
from laws.streams import check_any_cut, check_causal, check_gradient, check_reference

LAWS: dict[str, Callable[..., None]] = {
    "1 any cut": check_any_cut,
    "1 gradient": check_gradient,
    "2 reference": check_reference,
    "3 causal": check_causal,
    "4 row alone": check_row_alone,
    "4 mask": check_mask,
    "4 mask kinds": check_mask_kinds,
    "4 masked row": check_masked_row,
    "4 reset": check_reset,
    "4 served": check_served,
    "5 form": check_form,
    "5 bounded": check_bounded,
    "5 detached": check_detached,
    "5 pure": check_pure,
    "5 owned": check_owned,
    "5 quiet": check_quiet,
    "6 replay": check_replay,
    "6 checkpoint": check_checkpoint,
    "6 advance": check_advance,
    "6 truncation": check_truncation,
    "7 saved": check_saved,
    "7 precision": check_precision,
    "7 accumulators": check_accumulators,
    "7 far": check_far,
    "9 options": check_options,
    "9 shapes": check_shapes,
}


def check(law: str, case: Case, folder: Path) -> None:
    """Run one law's check; `folder` is for files."""
    extra: dict[str, Any] = {"folder": folder} if law == "7 saved" else {}
    LAWS[law](case, **extra)
