"""Training of experts: REINFORCE with a KL penalty (arXiv 2501.06252, section 3.1), or the next-token objective."""

from t2.training.options import TrainOptions
from t2.training.trainer import Result, Trainer, train

__all__ = ["Result", "TrainOptions", "Trainer", "train"]
