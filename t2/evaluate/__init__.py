"""The tables of arXiv 2501.06252 for a bank of experts: what `t2 eval` measures and writes."""

from t2.evaluate.cells import Cells
from t2.evaluate.measuring import Measuring, Missing
from t2.evaluate.plan import Plan, TaskPlan, load_plan
from t2.evaluate.sections import SECTIONS, measure
from t2.evaluate.tables import document, summary

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
