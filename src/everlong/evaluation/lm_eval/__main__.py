"""lm-eval's command with our tasks and model classes."""

import importlib
import sys

from everlong.errors import UserError
from everlong.evaluation.lm_eval import tasks_path


def main() -> int:
    """Hands the arguments on, with `--include_path` unless it is given."""
    try:
        client = importlib.import_module("lm_eval.__main__")  # of an extra
    except ImportError:
        sys.stderr.write("everlong: lm-eval is missing: pip install 'everlong[eval]'\n")
        return UserError.exit_code
    import everlong.auto  # noqa: F401 (registers our classes)

    if not any(word.startswith("--include_path") for word in sys.argv):
        sys.argv += ["--include_path", tasks_path()]
    client.cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
