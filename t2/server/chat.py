"""`t2 chat`: a conversation in the terminal, on the engine that the server has."""

from __future__ import annotations

from rich.console import Console

from t2.generation.sampling import Sampling
from t2.server.answers import Answers, Mail, chat_prompt
from t2.server.errors import ApiError
from t2.server.experts import Experts
from t2.server.opened import Opened

HELP = "/expert NAME, /experts, /reset, /quit"


def chat(opened: Opened, expert: str, sampling: Sampling, new_tokens: int, console: Console) -> int:
    """Reads and answers until the input ends."""
    experts = Experts(opened)
    experts.look()
    console.print(f"{opened.model}: {', '.join(experts.names)}. {HELP}", style="dim", highlight=False)
    said: list[dict[str, str]] = []
    try:
        while True:
            try:
                words = console.input(f"[bold]{expert}>[/bold] ").strip()
            except (EOFError, KeyboardInterrupt):
                return 0
            command, _, name = words.partition(" ")
            if command == "/quit":
                return 0
            if command == "/reset":
                said = []
            elif command == "/experts":
                console.print(", ".join(experts.names), highlight=False)
            elif command == "/expert" and name:
                expert = name.strip()
            elif command.startswith("/"):
                console.print(HELP, style="dim", highlight=False)
            elif words:
                asked = [*said, {"role": "user", "content": words}]
                try:
                    answer = _answer(experts, expert, asked, sampling, new_tokens, console)
                    text = opened.engine.alongside(answer)
                    said = [*asked, {"role": "assistant", "content": text}]
                except ApiError as error:
                    console.print(str(error), style="red", highlight=False)
                except KeyboardInterrupt:
                    console.print()
    finally:
        opened.engine.close()


async def _answer(
    experts: Experts, expert: str, said: list[dict[str, str]], sampling: Sampling, new_tokens: int, console: Console
) -> str:
    """Prints the answer as it comes, then whose it was and its length."""
    prompt, words = chat_prompt(experts.tokenizer, said)
    chosen = await experts.choose(expert, words)
    engine = experts.engine
    answers = Answers(Mail(engine), engine, experts.tokenizer, float("inf"))
    most = max(1, min(new_tokens, engine.max_tokens - len(prompt)))
    answer = answers.begin(prompt, chosen, max_tokens=most, sampling=sampling)
    text = ""
    async for pieces in answers.pieces():
        for _, piece in pieces:
            text += piece.text
            console.print(piece.text, end="", markup=False, highlight=False, soft_wrap=True)
    about = [chosen.name, *([] if chosen.reason is None else [chosen.reason]), f"{answer.made} tokens"]
    console.print(f"\n({'; '.join(about)})", style="dim", highlight=False)
    return text
