"""The `everlong` command. Each command is a file, imported only when it is called."""

import dis
import os
import signal
import sys
from collections.abc import Sequence

from everlong.cli.processes import tells_errors
from everlong.errors import Interrupted, UserError

_COMMANDS = {
    "train": "Train a model from a recipe, or go on with a run.",
    "evaluate": "Bits per byte of a text, and accuracy of tasks at any length.",
    "inspect": "One page of what a run's memory kept, overwrote and forgot of a text.",
    "generate": "Continue a text with a run's model, or read one for ever.",
    "list": "The memories everlong knows, with their bytes of state.",
    "show": "One memory: what it keeps, its options and their defaults.",
    "env": "Versions and hardware, for a bug report.",
}
_BENCHES = {
    "replay": "Memory replay against back-propagation through time: memory and time.",
    "recall": "Train the recall task and its controls over three seeds.",
    "bytes": "Recall against bytes of state: five questions, every memory, one plot.",
    "copy": "Copy a source across segments: tokens that recur against a cache.",
    "delayed": "Recall the first symbol after long delays: Stable Hadamard Memory and a GRU.",
    "overwriting": "Recall of overwritten values: the update rules of the linear family.",
    "hybrid": "Linear layers with attention in one of four: recall, and bits per byte by ratio.",
    "mixture": "Mixture-of-Memories: what it keeps at equal cost and at equal bytes of state.",
    "language": "Every memory on a text at equal parameters: bits per byte, bytes of state.",
    "cost": "Every memory's time a token and bytes of state against stream length.",
    "training": "Training of models of width 512 against the peak of the machine's products.",
    "decoding": "Tokens a second against the time the weights take to be read, and a long cache.",
    "reliability": "How often everlong breaks: cuts, odd input, kills, a soak, damaged files.",
    "memformer": "What the Memformer paper claims, measured here again, part by part.",
}


def build_app():
    """The parser: commands are import strings, so `--help` loads none of them."""
    from cyclopts import App

    from everlong import __version__

    about = "Memory for sequence models: read streams far longer than a context window."
    app = App(
        name="everlong",
        help=about,
        version=__version__,
        help_format="plaintext",
        suppress_keyboard_interrupt=False,
    )
    for name, line in _COMMANDS.items():
        function = "list_command" if name == "list" else name
        app.command(f"everlong.cli.{name}:{function}", name=name, help=line)
    bench = App(name="bench", help="Measure everlong on this machine.", help_format="plaintext")
    for name, line in _BENCHES.items():
        bench.command(f"everlong.cli.bench:{name}", name=name, help=line)
    app.command(bench)
    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; what a user can put right is one line, code 2."""
    try:
        from cyclopts import CycloptsError
    except KeyboardInterrupt:
        return _say("interrupted", 128 + signal.SIGINT)

    if sys.stdout is None:
        return _say("standard output is closed: send it to a file or to /dev/null")
    try:
        code = build_app()(
            argv,
            print_error=False,
            exit_on_error=False,
            result_action="return_value",
        )
        sys.stdout.flush()
        return code or 0
    except CycloptsError as error:
        return _say(f"{error} See `everlong --help`.")
    except KeyboardInterrupt:
        return _say("interrupted", 128 + signal.SIGINT)
    except BrokenPipeError:
        # The reader left (`| head`): nothing is wrong. Python flushes stdout once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Interrupted as stop:
        return _say(str(stop), stop.exit_code)
    except (ValueError, OSError) as error:
        if not _is_for_the_user(error):
            raise
        return _say(_words(error))
    except (MemoryError, RuntimeError) as error:
        if not _is_too_large(error):
            raise
        return _say("not enough memory for such sizes: make the model, segments or batch smaller")


def _words(error: ValueError | OSError) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _is_for_the_user(error: ValueError | OSError) -> bool:
    """A file that cannot be used, or a ValueError of ours: any other is a bug, shown whole.

    Ours is a UserError, or a plain ValueError from a `raise` in this package: what int() or a codec
    raises where we call it is none.
    """
    if isinstance(error, OSError):
        return error.errno is not None
    if isinstance(error, UserError):
        return True
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    if type(error) is not ValueError or trace is None:
        return False
    instruction = dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]]
    module = trace.tb_frame.f_globals.get("__name__", "")
    return module.startswith("everlong.") and instruction == "RAISE_VARARGS"


def _is_too_large(error: MemoryError | RuntimeError) -> bool:
    """Whether memory was refused; torch says it in words, on accelerators by a class of its own."""
    words = ("out of memory", "can't allocate memory", "size calculation overflowed")
    words += ("integer multiplication overflow",)
    return isinstance(error, MemoryError) or any(each in str(error) for each in words)


def _say(message: str, code: int = UserError.exit_code) -> int:
    if tells_errors():
        print("everlong: " + " ".join(message.split()), file=sys.stderr)
    return code
