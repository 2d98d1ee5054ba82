"""Every error a user can meet, and the exit code the command line gives it.

    OpcompileError                    (1)
    ├── SpecError        ValueError   (2)  a layer that no system could compute
    ├── ModelError       ValueError   (2)  an ONNX file or node that cannot be used
    ├── WordsError       ValueError   (2)  a layer in another system's words that this system refuses
    ├── RecordError      ValueError   (2)  a tuned record that is corrupt or made for something else
    ├── ArtifactError    ValueError   (2)  a directory that is not, or is no longer, an artifact
    ├── CallError        ValueError   (2)  arguments that do not fit the compiled kernel
    ├── TargetError                   (3)  a machine that cannot be built for here, or is not here to be asked
    │   └── UnknownTargetError ValueError (2)  words that name no target, or no tracker
    ├── EngineError                   (3)  a package or program that is needed and missing
    └── VerificationError             (1)  outputs beyond the error bound

A message says what was given, which rule it breaks, and what to do.
"""

from __future__ import annotations


class OpcompileError(Exception):
    """The root: catch this to catch everything that `opcompile` raises on purpose."""

    exit_code = 1


class SpecError(OpcompileError, ValueError):
    """A layer whose attributes contradict each other or the operator's definition."""

    exit_code = 2


class ModelError(OpcompileError, ValueError):
    """An ONNX file that cannot be read, or a node in it that cannot be compiled."""

    exit_code = 2


class WordsError(OpcompileError, ValueError):
    """A layer said in another system's words, that this system itself would refuse; its rule is in the message."""

    exit_code = 2


class RecordError(OpcompileError, ValueError):
    """A tuned record that is corrupt, or was tuned for another declaration or target."""

    exit_code = 2


class ArtifactError(OpcompileError, ValueError):
    """A directory that is not an artifact, or whose files changed since it was written."""

    exit_code = 2


class CallError(OpcompileError, ValueError):
    """Arguments of the wrong number, shape, dtype or device for a compiled kernel."""

    exit_code = 2


class TargetError(OpcompileError):
    """A target that this machine cannot build for or run, or machines that cannot be reached."""

    exit_code = 3


class UnknownTargetError(TargetError, ValueError):
    """Words that name no target, or no tracker: nobody could have it."""

    exit_code = 2


class EngineError(OpcompileError):
    """A package or program that is needed for this step and is not installed."""

    exit_code = 3


class KernelError(EngineError):
    """A kernel that its compiler refuses, or that needs more than its device has: others may be fine."""


class VerificationError(OpcompileError):
    """Outputs that lie beyond the derived error bound."""


def first_line(error: BaseException) -> str:
    """Return what an exception says first, after its name."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def first_words(error: BaseException) -> str:
    """Return the first words of an exception, for the middle of a sentence; its name where it has none."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")
