"""Tasks that experts are trained and evaluated on."""

from typing import TYPE_CHECKING

from t2._lazy import lazy_names

if TYPE_CHECKING:
    from t2.tasks.base import Problem, Split, Task, prompt_text
    from t2.tasks.registry import get, names, options_of

__all__ = ["Problem", "Split", "Task", "get", "names", "options_of", "prompt_text"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Problem": "t2.tasks.base",
        "Split": "t2.tasks.base",
        "Task": "t2.tasks.base",
        "get": "t2.tasks.registry",
        "names": "t2.tasks.registry",
        "options_of": "t2.tasks.registry",
        "prompt_text": "t2.tasks.base",
    },
)
