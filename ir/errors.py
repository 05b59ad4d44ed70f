"""The errors that Treadle raises on purpose.

Each says what is wrong, where in the user's code (when a place is known) and what to do about it.
All derive from `TreadleError`, so one `except` clause catches everything the stack reports.
"""


class TreadleError(Exception):
    """Base class. `message` says what and how to mend it; `where` is the user's source line, if known."""

    def __init__(self, message: str, where: object = None):
        super().__init__(message)
        self.message = message
        self.where = where

    def __str__(self) -> str:
        return f"{self.message}\n  at {self.where}" if self.where else self.message


class ShapeError(TreadleError, ValueError):
    """Shapes or ranks that an operation cannot take."""


class DTypeError(TreadleError, TypeError):
    """A dtype that an operation cannot take, or two that do not match."""


class AttributeValueError(TreadleError, ValueError):
    """An attribute of an operation (an axis, a window, a mode...) outside its domain."""


class TraceError(TreadleError, RuntimeError):
    """Something that cannot be traced: data-dependent Python control flow, a leaked tracer..."""


class GradientError(TreadleError, ValueError):
    """A gradient that does not exist or was asked of the wrong thing."""


class MissingRuleError(TreadleError, LookupError):
    """An op has no rule in a slot (vjp, lower, ...) that a transform needs."""


class RegistryError(TreadleError, LookupError):
    """An op, pass or plugin registered twice, or asked for by an unknown name."""


class VerifyError(TreadleError, AssertionError):
    """A graph that breaks an invariant of the IR: a bug in the pass that made it."""


class ParseError(TreadleError, ValueError):
    """Text that is not the text form of a graph."""


class ArgumentsError(TreadleError, TypeError):
    """A compiled function was called with another tree of arguments than it was made for."""


class TargetError(TreadleError, ValueError):
    """A target that is unknown, or cannot run on this machine."""


class CompileError(TreadleError, RuntimeError):
    """A kernel or program could not be built."""


class ArtifactError(TreadleError, ValueError):
    """A saved artifact that is corrupt, too new, or made for another machine."""


class CheckpointError(TreadleError, ValueError):
    """A checkpoint that is corrupt or does not fit the model."""


class ConfigError(TreadleError, ValueError):
    """An environment variable or option with a value outside its domain."""


class OnnxError(TreadleError, ValueError):
    """An ONNX model that is damaged, not valid, or uses what is not supported; the message names the node."""
