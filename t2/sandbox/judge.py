"""The judge's side: runs the tests of a program that is in another process and another sandbox.

Runs in a sandbox of its own, standard library only. The tests call functions of the program by proxies. A proxy sends
the arguments and gets data back, which `wire.py` builds anew from builtin types, so that every comparison of the tests
is made here, between objects that the program has no part in. The mark that stands for "passed" is known to this
process and its caller only, and leaves by a descriptor that the program does not have.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from t2.sandbox.wire import EXCEPTIONS, NONCE_BYTES, DecodeError, EncodeError, decode, encode, receive, send


class NoAnswer(BaseException):
    """The program has ended, sent no message, or returned a value that can't be compared."""


class Program:
    """Proxy of the program for the tests.

    Args:
        replies, requests: descriptors.
    """

    def __init__(self, replies: int, requests: int) -> None:
        self.replies = replies
        self.requests = requests
        self.failed = False
        """True once a call had no answer, even if the tests caught the error."""

    def function(self, name: str) -> Callable[..., Any]:
        def proxy(*args: Any, **kwargs: Any) -> Any:
            return self.ask("call", name, args, kwargs)

        proxy.__name__ = proxy.__qualname__ = name
        return proxy

    def iterator(self, number: int) -> Iterator[Any]:
        """Iterator that fetches one item from the program at a time."""
        while True:
            try:
                item = self.ask("next", number)
            except StopIteration:
                return
            yield item

    def ask(self, *request: Any) -> Any:
        """Sends a request and returns the value of the reply, or raises its exception."""
        try:
            content = encode(request)
        except EncodeError as error:
            self.failed = True
            raise NoAnswer(f"the tests pass {error}") from None
        nonce = os.urandom(NONCE_BYTES)
        try:
            if self.failed:
                raise DecodeError("none after the last one")
            send(self.requests, nonce, content)
            returned, reply = receive(self.replies)
            if returned != nonce:
                raise DecodeError("not of this request")
            match decode(reply, self.iterator):
                case ("return", value):
                    return value
                case ("raise", str() as name, tuple() as args) if name in EXCEPTIONS:
                    kind = EXCEPTIONS[name]
                    if issubclass(kind, StopIteration | StopAsyncIteration) and request[0] != "next":
                        kind, args = RuntimeError, (f"the program raised {name}",)  # would end a loop of the tests
                    raised = exception(kind, args)
                case ("refuse", str() as reason):
                    raise DecodeError(reason)
                case _:
                    raise DecodeError("not a reply")
        except (EOFError, OSError, DecodeError) as problem:
            self.failed = True
            raise NoAnswer(f"{type(problem).__name__}: {problem}") from None
        raise raised


def exception(kind: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    try:
        return kind(*args)
    except Exception:  # those that want arguments of certain types
        return kind.__new__(kind)


def main(
    replies: int,
    requests: int,
    prelude: str,
    tests: str,
    functions: Sequence[str],
    others: Sequence[str],
    mark: bytes,
) -> int:
    """Runs the tests; writes the mark to standard output if they come to their end.

    Args:
        replies, requests: descriptors.
        prelude: trusted code to run before the tests.
        tests: trusted code; what it prints is dropped.
        functions: names that are functions of the program whatever the prelude defines.
        others: names that are functions of the program unless the prelude defines them.
        mark: as the caller knows it.

    Returns:
        The exit code, 0 if the tests passed.
    """
    verdict = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    program = Program(replies, requests)
    names: dict[str, Any] = {"__name__": "__main__", **{name: program.function(name) for name in others}}
    exec(compile(prelude, "<prelude>", "exec", dont_inherit=True), names)
    names.update({name: program.function(name) for name in functions})
    exec(compile(tests, "<tests>", "exec", dont_inherit=True), names)
    if program.failed:
        return 1
    os.write(verdict, mark)
    return 0
