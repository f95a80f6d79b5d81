"""What a user can put right, as one-line exceptions with the exit code of the command line."""

import signal


class UserError(ValueError):
    """Something the user can put right; the message is one line and names the remedy."""

    exit_code = 2


class DamagedCheckpoint(UserError):
    """A checkpoint whose files are not those that were written."""


class Diverged(UserError):
    """Loss, gradients or weights are no longer finite; the last good checkpoint is named."""


class Interrupted(Exception):
    """A signal ended a run after a finished step and a checkpoint: nothing is lost.

    `exit_code` is 130 after Ctrl-C and 143 after SIGTERM; `resume` is the command that goes on.
    """

    def __init__(self, signum: int, step: int, resume: str):
        self.exit_code, self.step, self.resume = 128 + signum, step, resume
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name} after step {step}; go on with: {resume}")
