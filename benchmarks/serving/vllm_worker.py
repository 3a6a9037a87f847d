"""vLLM's side of `engine_peers`, for a Python that has vLLM and nothing of this package.

    python vllm_worker.py MODEL_FOLDER

Reads requests as JSON lines, {"prompts": [[token, ...], ...], "new_tokens": N}, and prints the seconds that prompts
with one token each took, and that all took when they were asked for again. Greedy, bfloat16, without prefix cache.
"""

from __future__ import annotations

import json
import sys
import time

from vllm import LLM, SamplingParams, __version__


def main(folder: str) -> None:
    model = LLM(folder, dtype="bfloat16", max_model_len=512, max_num_seqs=32, enable_prefix_caching=False)
    print(json.dumps({"vllm": __version__}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]

        def seconds(tokens: int, prompts: list[dict[str, list[int]]] = prompts) -> float:
            options = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            start = time.perf_counter()
            model.generate(prompts, options, use_tqdm=False)
            return time.perf_counter() - start

        print(json.dumps({"prompt_seconds": seconds(1), "seconds": seconds(request["new_tokens"])}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
