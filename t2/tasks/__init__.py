"""Tasks that experts are trained and judged on."""

from t2.tasks.base import Problem, Split, Task, prompt_text

__all__ = ["Problem", "Split", "Task", "prompt_text"]
