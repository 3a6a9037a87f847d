"""Tasks that experts are trained and judged on."""

from t2.tasks.base import Problem, Split, Task, prompt_text
from t2.tasks.registry import get, names, options_of

__all__ = ["Problem", "Split", "Task", "get", "names", "options_of", "prompt_text"]
