"""Run every command of docs/quickstart.md in an empty folder, and time it; then the same with PEFT and TRL.

    python -m benchmarks.journey.run

Commands are those of the page, section by section; the server is asked once by each name and ended. Writes
benchmarks/results/journey.json.
"""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from benchmarks.common.tables import RESULTS, ROOT, Table, write_results
from t2.weights.machine import machine

PAGE = ROOT / "docs" / "quickstart.md"
PEER = ROOT / "benchmarks" / "journey" / "with_peft.py"
PORT = 8731
QUESTION = "Count the users of 1999."


def sections() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Headings of the page from the second section on, with the code blocks of each: (language, text)."""
    for part in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[2:]:
        blocks = re.findall(r"^```(\w+)\n(.*?)^```$", part, flags=re.MULTILINE | re.DOTALL)
        if blocks:
            yield part.splitlines()[0], blocks


def commands(block: str) -> Iterator[list[str]]:
    """The words of each line of a shell block, continued lines joined."""
    for line in block.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def run(words: list[str], folder: Path, log: Path) -> float:
    """Seconds of one command in the folder; its output goes to the log."""
    start = time.perf_counter()
    with log.open("a") as out:
        print(f"$ {shlex.join(words)}", file=out, flush=True)
        if words[:1] == ["t2"]:
            words = [sys.executable, "-m", "t2", *words[1:]]
        done = subprocess.run(words, cwd=folder, stdout=out, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"{shlex.join(words)}: exit code {done.returncode}\n{log.read_text()[-3000:]}")
    return time.perf_counter() - start


def serve(words: list[str], folder: Path, log: Path) -> dict[str, Any]:
    """Starts the server, asks the question of the base, the expert and auto, and ends it with SIGTERM."""
    start = time.perf_counter()
    with log.open("a") as out:
        print(f"$ {shlex.join(words)}", file=out, flush=True)
        command = [sys.executable, "-m", "t2", *words[1:], "--port", str(PORT)]
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=subprocess.STDOUT)
    try:
        while not answers(f"http://127.0.0.1:{PORT}/health"):
            if process.poll() is not None:
                raise SystemExit(f"{shlex.join(words)}: ended\n{log.read_text()[-3000:]}")
            time.sleep(0.2)
        started = time.perf_counter() - start
        said = {}
        for name in ("base", "sql", "auto"):
            model = words[2] if name == "base" else name
            body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 32}
            request = urllib.request.Request(
                f"http://127.0.0.1:{PORT}/v1/chat/completions",
                json.dumps(body | {"temperature": 0}).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=120) as answer:
                said[name] = json.load(answer)["choices"][0]["message"]["content"].strip()
        seconds = time.perf_counter() - start
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    return {"seconds": seconds, "started": started, "answers": said}


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def journey(folder: Path, log: Path, console: Console) -> dict[str, Any]:
    """Seconds of each section, and what the server said."""
    found: dict[str, Any] = {"sections": {}}
    for heading, blocks in sections():
        seconds, ran = 0.0, 0
        for language, text in blocks:
            if language == "python":
                script = folder / "block.py"
                script.write_text(text)
                seconds, ran = seconds + run([sys.executable, str(script)], folder, log), ran + 1
                continue
            for words in commands(text):
                ran += 1
                if words[:2] == ["t2", "serve"]:
                    found["server"] = serve(words, folder, log)
                    seconds += found["server"]["seconds"]
                else:
                    seconds += run(words, folder, log)
        found["sections"][heading] = {"seconds": seconds, "commands": ran}
        console.print(f"{heading}: {seconds:.0f} s")
    for name in ("sql", "sql-rl"):
        found[name] = json.loads((folder / "runs" / name / "result.json").read_text())
    return found


def lines_of(path: Path) -> int:
    """Lines of code of a Python file, without empty ones, comments and docstrings."""
    text = re.sub(r'"""(.*?)"""', "", path.read_text(), flags=re.DOTALL)
    return sum(1 for line in text.splitlines() if line.strip() and not line.strip().startswith("#"))


def lines_of_page() -> int:
    """Lines that a reader types for all sections but the one that writes the data."""
    count = 0
    for heading, blocks in sections():
        if "data" in heading:
            continue
        for language, text in blocks:
            count += (
                len(list(commands(text))) if language == "bash" else len([x for x in text.splitlines() if x.strip()])
            )
    return count


def journey_table(results: Any) -> Table:
    """Seconds and lines of each step, beside those of PEFT and TRL."""
    ours, peer = results["ours"], results["peft"]
    rows = []
    for heading, found in ours["sections"].items():
        name = heading.partition(". ")[2]
        took = peer["seconds"].get(name)
        rows.append([name, f"{found['seconds']:.0f}", "" if took is None else f"{took:.0f}"])
    rows.append(["all", f"{results['seconds']:.0f}", f"{peer['all_seconds']:.0f}"])
    rows.append(["lines to write", str(results["lines"]), str(peer["lines"])])
    base, best = (f"{ours['sql'][name]['accuracy']:.0%}" for name in ("base", "best"))
    rewarded = f"{ours['sql-rl']['best']['accuracy']:.0%}"
    rows.append([f"right on the test split (base {base})", f"{best}, by rewards {rewarded}", f"{peer['accuracy']:.0%}"])
    about = results["machine"]
    return Table(
        f"The [quickstart](quickstart.md) in an empty folder with SmolLM2-135M-Instruct on {about['threads']} cores of "
        f"{about['processor']}, in seconds (`make journey`). Beside it the same data with TRL's SFTTrainer, a LoRA of "
        "r = 16, and evaluation, choice of the expert and server by hand (`benchmarks/journey/with_peft.py`):",
        ["step", "t2", "PEFT, TRL and code by hand"],
        rows,
        "t2 trains twice, on the answers and by rewards, and its classification expert tells four domains and others "
        "apart; the code by hand trains once, tells its own questions from others, and answers one request at a time.",
    )


def main(results: Path = RESULTS / "journey.json") -> None:
    """Args:
    results: File for the results as JSON.
    """
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name) / "empty", Path(name) / "log"
        folder.mkdir()
        start = time.perf_counter()
        ours = journey(folder, log, console)
        seconds = time.perf_counter() - start
        content = {"machine": machine(), "ours": ours, "seconds": seconds, "lines": lines_of_page()}
        console.print(f"all: {seconds:.0f} s; then PEFT and TRL")
        start = time.perf_counter()
        done = subprocess.run([sys.executable, str(PEER)], cwd=folder, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{PEER}: exit code {done.returncode}")
        peer = json.loads(done.stdout.splitlines()[-1])
        peer |= {"all_seconds": time.perf_counter() - start, "lines": lines_of(PEER)}
    content["peft"] = peer
    write_results(results, content)
    journey_table(content).show()


if __name__ == "__main__":
    tyro.cli(main)
