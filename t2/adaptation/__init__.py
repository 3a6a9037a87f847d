"""Self-adaptation: a first pass chooses the experts of each request (arXiv 2501.06252, section 3.2)."""

from typing import TYPE_CHECKING

from t2._lazy import lazy_names

if TYPE_CHECKING:
    from t2.adaptation.bank_folder import BankFolder, load_bank_folder, save_bank_folder
    from t2.adaptation.base import Adaptation, Strategy
    from t2.adaptation.dispatch import ClassifierStrategy, PromptStrategy
    from t2.adaptation.few_shot import FewShotResult, FewShotStrategy, few_shot_problems
    from t2.adaptation.inference import TwoPass, two_pass
    from t2.adaptation.options import FewShotOptions
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

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Adaptation": "t2.adaptation.base",
        "BankFolder": "t2.adaptation.bank_folder",
        "ClassifierStrategy": "t2.adaptation.dispatch",
        "Domain": "t2.tasks.classify",
        "FewShotOptions": "t2.adaptation.options",
        "FewShotResult": "t2.adaptation.few_shot",
        "FewShotStrategy": "t2.adaptation.few_shot",
        "PromptStrategy": "t2.adaptation.dispatch",
        "Strategy": "t2.adaptation.base",
        "TwoPass": "t2.adaptation.inference",
        "classification_task": "t2.tasks.classify",
        "few_shot_problems": "t2.adaptation.few_shot",
        "load_bank_folder": "t2.adaptation.bank_folder",
        "save_bank_folder": "t2.adaptation.bank_folder",
        "two_pass": "t2.adaptation.inference",
    },
)
