"""vLLM's side of `engine_peers` and `vllm_experts`, for a Python that has vLLM.

    python vllm_worker.py MODEL_FOLDER [OPTIONS]

OPTIONS is JSON, arguments of `vllm.LLM`. Reads requests as JSON lines:

    {"prompts": [[token, ...], ...], "new_tokens": N}    all greedy, without an end token
    "experts": [NAME or null, ...]                       of the bank in T2_BANK, one for each prompt
    "adapters": [FOLDER, ...]                            LoRA adapters, one for each prompt
    "answers": true                                      prints the answers' tokens

and prints the seconds that prompts with one token each took, and that all took when they were asked for again.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from vllm import LLM, SamplingParams, __version__
from vllm.lora.request import LoRARequest

DEFAULTS = {"dtype": "bfloat16", "max_model_len": 512, "max_num_seqs": 32, "enable_prefix_caching": False}


def adapters_of(request: dict[str, Any]) -> list[LoRARequest | None] | None:
    """vLLM's requests for the experts or LoRA adapters of the prompts."""
    if "experts" in request:
        from t2.integrations.vllm.bank import lora_request

        return [None if name is None else lora_request(name) for name in request["experts"]]
    if "adapters" in request:
        return [LoRARequest(path, place, path) for place, path in enumerate(request["adapters"], 1)]
    return None


def main(folder: str, options: str = "{}") -> None:
    model = LLM(folder, **(DEFAULTS | json.loads(options)))
    print(json.dumps({"vllm": __version__}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
        adapters = adapters_of(request)

        def run(tokens: int, prompts: Any = prompts, adapters: Any = adapters) -> tuple[float, list[list[int]]]:
            sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            start = time.perf_counter()
            found = model.generate(prompts, sampling, use_tqdm=False, lora_request=adapters)
            return time.perf_counter() - start, [list(each.outputs[0].token_ids) for each in found]

        prompt_seconds, _ = (0.0, None) if request.get("answers") else run(1)
        seconds, answers = run(request["new_tokens"])
        found: dict[str, Any] = {"prompt_seconds": prompt_seconds, "seconds": seconds}
        if request.get("answers"):
            found["answers"] = answers
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
