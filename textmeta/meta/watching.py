"""What others see of a run while it goes on: trackers that get its rows, and its curves as a picture."""

import functools
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import filter_trackers

from textmeta.errors import SettingsError, logger
from textmeta.files import write_atomically
from textmeta.meta.checkpoint import rows_of

_say_once = functools.cache(logger.info)

CURVES = "curves.png"
VALID = ("valid_accuracy", "valid_accuracy_ci95")  # of rows, where there was a validation
SMOOTHED_OVER = 50  # steps, or fewer in a short run


def tracking(track: Any, output: Path) -> dict[str, Any]:
    """Return accelerate's settings for these trackers; SettingsError if one is not known or not installed."""
    names = [track] if isinstance(track, str) else list(track)
    try:
        found = filter_trackers(names, output)
    except ValueError as error:
        raise SettingsError(f"track: {error}") from error
    if missing := {str(name) for name in names} - {str(tracker) for tracker in found}:
        raise SettingsError(f"track names {min(missing)!r}, which is not installed: pip install 'textmeta[track]'")
    return {"log_with": found or None, "project_dir": output.resolve().parent}


@contextmanager
def trackers(accelerator: Accelerator, output: Path, step: int) -> Iterator[None]:
    """Open the trackers of a run that goes on after a step, under the name of its folder; TensorBoard's lies in it."""
    name = output.resolve().name
    again = {"tensorboard": {"purge_step": step + 1}, "trackio": {"name": name, "resume": "allow"}}
    accelerator.init_trackers(name, init_kwargs=again)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:  # end_training would end the group of processes, too
            tracker.finish()


def draw_curves(record: Path) -> None:
    """Draw the curves of a record, as a picture beside it; without matplotlib the log says once that there is none."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        _say_once(f"there is no {CURVES} without matplotlib: pip install 'textmeta[plot]'")
        return
    every = rows_of(record)
    if not (rows := [row for row in every if "loss" in row]):  # no task could be learned from in the others
        return
    steps = np.array([row["step"] for row in rows])
    over = max(1, min(SMOOTHED_OVER, len(rows) // 5))
    figure = Figure((8, 6), layout="constrained")
    for axes, name in zip(figure.subplots(2, sharex=True), ("loss", "accuracy"), strict=True):
        values = np.array([row[name] for row in rows])
        smooth = np.convolve(values, np.full(over, 1 / over), "valid")
        axes.plot(steps, values, color="C0", alpha=0.25)
        axes.plot(steps[over - 1 :], smooth, color="C0", label=f"training, mean of {over} steps")
        axes.set_ylabel(name)
    judged = [[row[key] for key in ("step", *VALID)] for row in every if row.keys() >= set(VALID)]
    if judged:
        axes.errorbar(*np.transpose(judged), color="C1", capsize=3, label="validation, with 95 % intervals")
    axes.legend()
    axes.set_xlabel("step")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    write_atomically(record.with_name(CURVES), picture.getvalue())
