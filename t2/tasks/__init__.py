"""Tasks that experts are trained and judged on."""

from t2.tasks.base import Problem, Split, Task, prompt_text
from t2.tasks.registry import get, names

__all__ = ["Problem", "Split", "Task", "get", "names", "prompt_text"]
