"""Every error and warning of the package, so that they can be caught and filtered by name."""


class TrajectoryError(RuntimeError):
    """A trajectory on disk is not what was written: torn, altered, or of another format."""


class NonFiniteError(FloatingPointError):
    """The gradient of a step holds numbers that are not finite."""


class UnexplainedUpdateError(RuntimeError):
    """A parameter moved by more than the optimizer's rule and float rounding explain."""


class LoggingWarning(UserWarning):
    """Something could not be logged; training goes on."""


class ReplayWarning(UserWarning):
    """Replaying gave other bits than the run that was recorded: another machine or version of torch."""


class ResumeWarning(UserWarning):
    """Some steps were trained before the run ended but are not in its record."""


class SampleMismatchWarning(UserWarning):
    """The per-sample losses do not add up to the gradient that the optimizer saw."""


class ForwardModeFallbackWarning(UserWarning):
    """Some operation of the model cannot be differentiated the fast way; the results are the same, only later."""
