from __future__ import annotations

import os

import torch

# Read when triton is first imported, by whatever test: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
