"""The `t2 serve` command."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from t2.cli.options import OPTIONAL, Bank, Model

NOT_TAKEN = {
    "t2": ("replicas", "max_replicas"),
    "ray": ("max_connections",),
    "vllm": (
        *("replicas", "max_replicas", "max_waiting", "max_connections", "max_body"),
        *("answer_seconds", "admin_key", "log_prompts"),
    ),
}
"""Options that an engine does not take."""


def run(
    model: Model,
    bank: Bank = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    factor_dtype: Literal["float32", "bfloat16", "float16", "int8", "uint8", "int4"] = "bfloat16",
    form: Literal["factored", "delta"] = "factored",
    support: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint=OPTIONAL)] = None,
    engine: Literal["t2", "vllm", "ray"] = "t2",
    replicas: int = 1,
    max_replicas: Annotated[int | None, arg(help_behavior_hint=OPTIONAL)] = None,
    max_rows: int = 32,
    max_tokens: int = 2048,
    max_waiting: int = 1024,
    max_connections: int = 4096,
    max_body: int = 1 << 20,
    answer_seconds: float = 600.0,
    api_keys: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint=OPTIONAL)] = None,
    admin_key: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint=OPTIONAL)] = None,
    log_prompts: bool = False,
    compiled: bool = True,
) -> int:
    """Answer over HTTP as OpenAI's API does: /v1/models, /v1/completions, /v1/chat/completions, and a page at /.

    A request's model is the base by its name, an expert of the bank, a mix ("sums:0.7+logic:0.3") or "auto", where a
    first pass chooses. Experts come, are replaced and go with the files of the bank's folder.

    Example: t2 serve smollm2-135m-instruct --bank smollm2-135m-instruct

    Args:
        host: Address to listen on; others than this machine can reach 0.0.0.0, which needs --api-keys.
        port: Port to listen on.
        factor_dtype: Dtype in which the SVF factors are stored. In the delta form also that of the weights, which may
            be uint8 or int4.
        form: Factors, or W beside the components of a support: faster, for experts on that support alone.
        support: Support of the delta form: a file or folder; the bank's own by default.
        engine: This package's; several of it behind one address, by Ray Serve; or vLLM, which reads the bank's experts
            (docs/vllm.md). Ray and vLLM have to be installed.
        replicas: Servers behind the address, with Ray.
        max_replicas: More servers start under load, up to this number, with Ray.
        max_rows: Requests that run at a time; others wait.
        max_tokens: Maximum tokens of a request, prompt and answer together.
        max_waiting: Maximum number of requests that wait.
        max_connections: Maximum number of connections.
        max_body: Maximum size of a request, in bytes.
        answer_seconds: Longest time for an answer.
        api_keys: File with the keys that clients may send, one a line; without it everybody may ask.
        admin_key: File with the key that may add and remove experts over HTTP; without it nobody may.
        log_prompts: Write prompts to the log.
        compiled: Compile the model, on a CPU: the same answers, faster; kept for the next start. Needs a C++ compiler.
    """
    given = locals()
    unknown = [name for name in NOT_TAKEN[engine] if given[name] != signature(run).parameters[name].default]
    if unknown:
        raise ValueError(f"{unknown[0]}: expected another --engine beside it than {engine}, which does not take it")
    keys = [] if api_keys is None else _keys("api_keys", api_keys)
    if engine == "vllm":
        from t2.integrations.vllm.serve import serve as serve_by_vllm

        return serve_by_vllm(
            model,
            bank=bank,
            support=support,
            host=host,
            port=port,
            factor_dtype=factor_dtype,
            form=form,
            max_rows=max_rows,
            max_tokens=max_tokens,
            api_keys=keys,
            compiled=compiled,
        )
    import torch

    from t2.server.app import ServerOptions

    options = ServerOptions(
        api_keys=tuple(keys),
        admin_key=None if admin_key is None else _keys("admin_key", admin_key)[0],
        max_body=max_body,
        answer_seconds=answer_seconds,
        log_prompts=log_prompts,
    )
    shared: dict[str, Any] = {
        "bank": bank,
        "host": host,
        "port": port,
        "options": options,
        "dtype": getattr(torch, factor_dtype),
        "form": form,
        "support": support,
        "max_rows": max_rows,
        "max_tokens": max_tokens,
        "max_waiting": max_waiting,
        "compiled": compiled,
    }
    if engine == "ray":
        from t2.integrations.ray import serve as serve_by_ray

        return serve_by_ray(model, replicas=replicas, max_replicas=max_replicas, **shared)
    from t2.server.run import serve

    return serve(model, max_connections=max_connections, **shared)


def _keys(name: str, path: Path) -> list[str]:
    found = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not found:
        raise ValueError(f"{name}: expected at least one key in {path}, got none")
    return found
