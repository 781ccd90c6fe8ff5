"""Every error and warning that is the package's alone, so that they can be caught and filtered by name.

A wrong argument raises ValueError or TypeError, calls in a wrong order RuntimeError, and a directory that is not empty
FileExistsError, as everywhere in Python. Each message says what to do.

    warnings.filterwarnings("ignore", category=explaind_track.errors.ForwardModeFallbackWarning)
"""

__all__ = [
    "AuditWarning",
    "CheckpointError",
    "CheckpointWarning",
    "ForwardModeFallbackWarning",
    "GradientMismatchWarning",
    "LoggingWarning",
    "MissingStepWarning",
    "NonFiniteError",
    "ReplayWarning",
    "RerunWarning",
    "ResidualWarning",
    "ResumeWarning",
    "SampleMismatchWarning",
    "StaleTrackerWarning",
    "TrajectoryError",
    "UncheckedContentWarning",
    "UnexplainedUpdateError",
    "UnseenChangeWarning",
]


class NonFiniteError(FloatingPointError):
    """The gradient of a step holds numbers that are not finite.

    Raised by the Tracker before the optimizer uses it, so the parameters are still those before the step. Mend the
    loss or the learning rate and go on from there, or make the Tracker with `on_nonfinite="mark"`: it then takes the
    step, and marks its row instead of explaining it.
    """


class UnexplainedUpdateError(RuntimeError):
    """A parameter moved by more than the optimizer's rule and float rounding explain.

    Raised right after the step. Either something else wrote to the parameter while the optimizer stepped (a hook, a
    second optimizer, a projection: do that outside of the step), or the optimizer is a subclass with arithmetic of its
    own, which needs a rule of its own: see `explaind_track.update_rule`.
    """


class TrajectoryError(RuntimeError):
    """A trajectory, or another part of a run's record, is not to be had as it was written.

    Raised on opening, replaying, fetching, sending and going on with a record: a file of it is missing, torn, altered
    or of another format; the replay misses a keyframe; another process is writing there; or W&B does not give or has
    not taken all of it. The message names the file, and the command to repeat where repeating helps.
    """


class CheckpointError(RuntimeError):
    """A checkpoint, or a series of them, is not what it has to be to explain the run that wrote it.

    A file is missing, torn, of another kind or would have to be unpickled; its names, shapes or types are not the
    model's; the optimizer's state belongs to other parameters; or what it says of the learning rate contradicts itself.
    Raised before any work; the message names the file, what was expected and what to do.
    """


class CheckpointWarning(UserWarning):
    """Something about a checkpoint cannot be known from its files, or limits what its numbers mean.

    Weights in bfloat16 without a float32 copy, of which training's own step moves only a part; settings that two files
    tell differently. `CheckpointSeries.check` lists all of it before any work.
    """


class LoggingWarning(UserWarning):
    """Something could not be logged; training goes on.

    Mostly W&B does not answer, or has not taken rows or files: `explaind-track sync DIRECTORY` sends what it lacks from
    the record on this disk. Or that disk is full: make room, for rows that could not be written are lost. Each kind of
    failure is told of once.
    """


class MissingStepWarning(UserWarning):
    """A step is missing among those whose influences a Tracker gives.

    An exception or Ctrl-C came while it was explained, and the Tracker has no record (`trajectory=`) to explain it from
    again. The influences of the other steps are exact.
    """


class ReplayWarning(UserWarning):
    """Replaying a trajectory gave other bits than the run that was recorded, though the same numbers.

    Another machine, thread count or version of torch rounds otherwise. The replay goes on from the recorded keyframe,
    so that nothing accumulates; to get the bits of the run, replay where it ran. Other *numbers* raise TrajectoryError.
    """


class RerunWarning(UserWarning):
    """A rerun in which nothing was changed gave other bits than the run.

    Given by `rerun` with the first step at which it did, and how far off it is; `Rerun.proof` has the same. Differences
    far below those that a change makes do no harm, unless training is chaotic; to get the run's bits, rerun where it
    ran, with as many threads.
    """


class UnseenChangeWarning(UserWarning):
    """Something changed the model's weights between two steps, and what they were before is not known.

    A Tracker of large models keeps no copy of them between steps. That one change is missing among the influences,
    which are exact for every step; from then on it keeps copies, and explains such changes as the part `outside`.
    """


class UncheckedContentWarning(UserWarning):
    """A question holds something whose content cannot be told, such as an open file, a lock or a generator.

    Given by `explain(out=…)`, which compares what is asked with what the directory holds the answer to. Name a new
    directory whenever that content is another, or pass what it stands for as tensors, arrays or plain Python values.
    """


class ResidualWarning(UserWarning):
    """The split of some steps leaves more than half of their change over, so that it says little of parts and groups.

    Given by `explain` for steps whose nodes are too few: networks with kinks, large learning rates, `accuracy="live"`
    early in training. `accuracy="1e-2"` takes as many as are needed; `Influence.residual` tells what is left.
    """


class ResumeWarning(UserWarning):
    """Some steps were trained before the run ended, but had not reached its record.

    Given where `Tracker(..., resume=True)` goes on with a run that was killed. Training goes on from the last recorded
    step and takes the lost ones again; start the data order at `tracker.number`.
    """


class SampleMismatchWarning(UserWarning):
    """The per-sample losses do not add up to the gradient that the optimizer saw.

    Influences of training samples are wrong at these steps until they do; those of parameter groups are exact all the
    same. Tell `tracker.batch` of every batch, with its samples' weights in the loss; clip by `tracker.clip_grad_norm_`;
    name losses that belong to no sample in `auxiliary=`; and explain in the mode (train or eval) of the training.
    """


class StaleTrackerWarning(UserWarning):
    """A Tracker was made of an optimizer that another one still watched, and has ended that.

    As where a cell of a notebook is run twice. The earlier record is complete up to its last step, and its influences
    can still be asked for. End a Tracker by its `finish()`, or write `with Tracker(…) as tracker:`.
    """


class AuditWarning(UserWarning):
    """An audited step's numbers are not those of a plain recomputation with ordinary autograd.

    Given by a Tracker with `audit_every=`; the message names the numbers. Do not believe them, look at the whole table
    with `audit(tracker, model, query, step=…)`, and tell us of the model: the engine computes something else for it
    than ordinary autograd does.
    """


class GradientMismatchWarning(UserWarning):
    """The gradients of a query's targets are not the derivative that forward mode gives.

    Some backward pass of the model is not the derivative of its forward pass: a gradient reversed, scaled or clipped on
    its way, a straight-through estimate. Influences of single samples and parameters are along the model's gradients,
    and do not add up to the change of the prediction; of groups, the residual tells.
    """


class ForwardModeFallbackWarning(UserWarning):
    """Some operation of the model cannot be differentiated the fast way.

    Given once for a model, with torch's reason. The results are the same, only later. Replace the operation to get the
    speed back, or ignore the warning.
    """
