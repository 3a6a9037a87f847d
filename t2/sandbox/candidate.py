"""The judged program's side: runs the program, then its functions as the judge asks, and sends back what they do.

Runs in the program's own process and sandbox, standard library only. The program can reach and change all of it;
nothing here is trusted. A changed reply is a wrong answer, and the judge, in a process and a sandbox of its own, takes
data only (`wire.py`).
"""

from __future__ import annotations

import os
import sys
from typing import Any

from t2.sandbox.wire import EXCEPTIONS, EncodeError, decode, encode, receive, send


def main(requests: int, replies: int, source: bytes) -> int:
    """Runs the program as `__main__`, then answers until the judge is done.

    Args:
        requests, replies: descriptors.
        source: the program.

    Returns:
        The exit code, if the program ends by itself.
    """
    path = os.path.join(os.getcwd(), "program.py")
    with open(path, "wb") as file:
        file.write(source)
    program = type(sys)("__main__")
    program.__file__ = path
    sys.modules["__main__"] = program
    sys.argv = [path]
    try:
        exec(compile(source, path, "exec", dont_inherit=True), program.__dict__)
    except BaseException:
        sys.__excepthook__(*sys.exc_info())
        return 1
    iterators: dict[int, Any] = {}

    def keep(iterator: Any) -> int:
        iterators[len(iterators)] = iterator
        return len(iterators) - 1

    while True:
        try:
            nonce, request = receive(requests)
        except EOFError:
            return 0
        try:
            match decode(request):
                case "call", name, args, kwargs:
                    reply = encode(("return", find(program, name)(*args, **kwargs)), keep)
                case "next", number:
                    reply = encode(("return", next(iterators[number])), keep)
        except EncodeError as error:
            reply = encode(("refuse", str(error)))
        except BaseException as error:
            reply = raised(error)
        send(replies, nonce, reply)


def find(program: Any, name: str) -> Any:
    if name in program.__dict__:
        return program.__dict__[name]
    raise NameError(f"name {name!r} is not defined")


def raised(error: BaseException) -> bytes:
    """The first class of an exception that is builtin, with its arguments."""
    kind = next(each for each in type(error).__mro__ if EXCEPTIONS.get(each.__name__) is each)
    try:
        return encode(("raise", kind.__name__, error.args))
    except Exception:
        return encode(("raise", kind.__name__, ()))
