"""A training run on the toy task as a program, for tests that kill it or start it more than once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from t2.training import Trainer, TrainOptions
from tests.t2.toy import SayTheWord, toy_model, toy_tokenizer

if __name__ == "__main__":
    torch.set_num_threads(1)
    given = json.loads(sys.argv[1])
    options = TrainOptions(**given | {"task": "say", "output": Path(given["output"]), "trackers": ()})
    result = Trainer(toy_model(), toy_tokenizer(), SayTheWord(), options).run()
    print("finished" if result.finished else "stopped", result.state.step)
