"""One measurement a file, so that a long benchmark that was stopped goes on where it was."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from everlong.errors import UserError


def cell(path: Path, config: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
    """What `measure` returns (JSON data), from the file where it lies there already.

    `UserError` where the file was measured under another `config`.
    """
    described = json.loads(json.dumps(config))
    if path.exists():
        try:
            held = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is damaged: remove it to measure again") from error
        if held["config"] != described:
            raise UserError(f"{path} was measured with other options: give --out a new folder")
        return held["found"]
    found = json.loads(json.dumps(measure()))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(json.dumps({"config": described, "found": found}, indent=1) + "\n", "utf-8")
    os.replace(aside, path)
    return found
