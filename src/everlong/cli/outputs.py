"""Files that a command writes for its user."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from everlong.errors import UserError


@contextmanager
def new_file(path: Path) -> Iterator[TextIO]:
    """Opened before the long reading, so that nothing is found in vain; gone if that fails.

    `UserError` where there is one: it may be what is being read.
    """
    try:
        # a name that is not UTF-8 becomes escapes: nothing of it is lost
        file = path.open("x", encoding="utf-8", errors="backslashreplace")
    except FileExistsError as error:
        raise UserError(f"{path} exists: give a new file") from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): give another file"
        ) from error
    try:
        with file:
            yield file
    except BaseException:
        path.unlink()
        raise
