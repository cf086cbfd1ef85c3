"""Reads a task name, gives problems split three ways, judges answers."""

from rankleap.tasks.catalog import TASKS, get_task
from rankleap.tasks.reasoning_gym import ReasoningGym
from rankleap.tasks.task import Task

__all__ = ["TASKS", "ReasoningGym", "Task", "get_task"]
