"""What networks of the zoo are for: data to calibrate on and to test with, truth, and scores with error bars.

>>> from onnxslim.models import tasks
>>> task = tasks.create("glosses")  # or tasks.create("glosses", "mpnet.dynamo")
>>> task.calibration(32), task.unlabelled(512)  # feeds of one sample each
>>> task.metric(session.run)  # the score that counts, as a number
"""

from __future__ import annotations

from onnxslim.models.tasks.base import Task
from onnxslim.models.tasks.estimates import Estimate, Outcomes
from onnxslim.models.tasks.fashion import Fashion
from onnxslim.models.tasks.files import Files
from onnxslim.models.tasks.lines import Lines
from onnxslim.models.tasks.mails import Mails
from onnxslim.models.tasks.photographs import Photographs
from onnxslim.models.tasks.retrieval import Docstrings, Glosses
from onnxslim.models.tasks.speech import Speech

__all__ = ["TASKS", "Estimate", "Outcomes", "Task", "create"]

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Photographs, Glosses, Docstrings, Mails, Speech, Lines, Files, Fashion)
}


def create(name: str, model: str = "") -> Task:
    """A task by name, for one of its models (the first by default).

    Raises:
        ValueError: there is no such task, or it is not for that model.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    return TASKS[name](model)
