"""Self-adaptation: a first pass chooses the experts of each request (arXiv 2501.06252, section 3.2)."""

from t2.adaptation.bank_folder import BankFolder, load_bank_folder, save_bank_folder
from t2.adaptation.base import Adaptation, Strategy
from t2.adaptation.dispatch import ClassifierStrategy, PromptStrategy
from t2.adaptation.few_shot import FewShotResult, FewShotStrategy, few_shot_problems
from t2.adaptation.search import FewShotOptions
from t2.adaptation.two_pass import TwoPass, two_pass
from t2.tasks.classify import Classification as classification_task
from t2.tasks.classify import Domain

__all__ = [
    "Adaptation",
    "BankFolder",
    "ClassifierStrategy",
    "Domain",
    "FewShotOptions",
    "FewShotResult",
    "FewShotStrategy",
    "PromptStrategy",
    "Strategy",
    "TwoPass",
    "classification_task",
    "few_shot_problems",
    "load_bank_folder",
    "save_bank_folder",
    "two_pass",
]
