"""The tables of arXiv 2501.06252 for a bank of experts: what `t2 eval` measures and writes."""

from t2.eval.report import document, summary
from t2.eval.result_cache import Cells
from t2.eval.runner import Measuring, Missing
from t2.eval.sections import SECTIONS, measure
from t2.eval.spec import Plan, TaskPlan, load_plan

__all__ = [
    "SECTIONS",
    "Cells",
    "Measuring",
    "Missing",
    "Plan",
    "TaskPlan",
    "document",
    "load_plan",
    "measure",
    "summary",
]
