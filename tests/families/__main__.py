"""Every family of models for text that transformers has, tiny, through the checks of a wrapped model.

    python -m tests.families [FAMILY ...] [--out FILE]

Each family runs in a process of its own: z = 1 against the plain model; a batch of several experts, its greedy tokens
from left-padded prompts and its beams against the merged models; two training steps, whose gradient must reach z alone;
and the model given back bit for bit. A family is right if all that runs is right, or if it is refused with the cause.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from t2kernels.files import write_text
from tests.families.checks import Verdict, report
from tests.families.tiny import families

LIMIT = 120
"""Seconds for a family."""


def in_process(family: str) -> dict[str, Any]:
    """The verdict on a family, whatever it does to its process."""
    ours, theirs = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=report, args=(family, theirs))
    process.start()
    theirs.close()
    try:
        if ours.poll(LIMIT):
            verdict: dict[str, Any] = ours.recv()
            return verdict
        cause = f"wrong: not done within {LIMIT} s"
    except EOFError:
        process.join()
        cause = f"wrong: the process ended with status {process.exitcode}"
    finally:
        process.kill()
        process.join()
    return asdict(Verdict(family, checks={"the process": cause}))


FORKS = multiprocessing.get_context("forkserver")
"""Processes that start with everything imported."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="default: all")
    parser.add_argument("--out", type=Path, help="the JSON file")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    FORKS.set_forkserver_preload(["tests.families.checks"])
    start, chosen = time.monotonic(), options.families or families()
    verdicts = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for found in tqdm(pool.map(in_process, chosen), total=len(chosen), desc="families"):
            verdicts.append(found)
            if wrong := Verdict(**found).wrong:
                tqdm.write(f"{found['family']}: {'; '.join(wrong)}")
    built = [each for each in verdicts if each["built"] == "ok"]
    wrong = [each["family"] for each in built if Verdict(**each).wrong]
    if options.out:
        for each in verdicts:
            each["left_out"] = len(each["left_out"])
        figures = {"transformers": transformers.__version__, "torch": torch.__version__, "families": verdicts}
        write_text(options.out, json.dumps(figures, indent=1) + "\n")
    minutes = (time.monotonic() - start) / 60
    print(f"{len(built)} of {len(verdicts)} families built, {len(wrong)} wrong, {minutes:.1f} minutes")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
