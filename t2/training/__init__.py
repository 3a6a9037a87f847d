"""Training of experts: REINFORCE with a KL penalty (arXiv 2501.06252, section 3.1), or the next-token objective."""

from typing import TYPE_CHECKING

from t2._lazy import lazy_names

if TYPE_CHECKING:
    from t2.training.options import TrainOptions
    from t2.training.trainer import Trainer, TrainResult, train

__all__ = ["TrainOptions", "TrainResult", "Trainer", "train"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "TrainResult": "t2.training.trainer",
        "TrainOptions": "t2.training.options",
        "Trainer": "t2.training.trainer",
        "train": "t2.training.trainer",
    },
    {"Result": "TrainResult"},
)
