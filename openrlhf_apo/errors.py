"""Every error that is meant for the user: one line that says what is wrong and what to do."""


class OptionError(ValueError):
    """A setting cannot be used. Exit code 2."""


class DataError(ValueError):
    """The data cannot be used. Exit code 2."""


class CompareError(ValueError):
    """A comparison cannot be made. Exit code 2."""


class LossError(ValueError):
    """A file of your own cannot be loaded, or a loss returned what cannot be trained on."""


class GroupError(ValueError):
    """A group that is partial or mixed: a group objective on it would be a different objective."""


class RunError(RuntimeError):
    """Something of the run failed for good. Exit code 1."""


class ProcessDied(RunError):
    """A process of the run is gone; another one could take its place."""


class RewardFailure(Exception):
    """One sample could not be scored; the message says why."""


def in_one_line(error: BaseException) -> str:
    """What your own code raised, as "NameError: name 'x' is not defined"."""
    message = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}: {message}"
