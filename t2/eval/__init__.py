"""Evaluation of a bank of experts: the tables of arXiv 2501.06252 that `t2 eval` measures and writes."""

from typing import TYPE_CHECKING

from t2._lazy import lazy_names

if TYPE_CHECKING:
    from t2.eval.report import SECTIONS, document, summary
    from t2.eval.result_cache import ResultCache
    from t2.eval.runner import EvalRunner, MissingResult
    from t2.eval.sections import measure
    from t2.eval.spec import EvalSpec, TaskSpec, load_spec

__all__ = [
    "SECTIONS",
    "EvalRunner",
    "EvalSpec",
    "MissingResult",
    "ResultCache",
    "TaskSpec",
    "document",
    "load_spec",
    "measure",
    "summary",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "SECTIONS": "t2.eval.report",
        "EvalRunner": "t2.eval.runner",
        "EvalSpec": "t2.eval.spec",
        "MissingResult": "t2.eval.runner",
        "ResultCache": "t2.eval.result_cache",
        "TaskSpec": "t2.eval.spec",
        "document": "t2.eval.report",
        "load_spec": "t2.eval.spec",
        "measure": "t2.eval.sections",
        "summary": "t2.eval.report",
    },
)
