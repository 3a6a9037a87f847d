"""llama.cpp's side of `engine_peers`, for a Python that has llama-cpp-python and nothing of this package.

    python llama_cpp_worker.py MODEL.gguf THREADS [Q8_0.gguf]

Reads requests as JSON lines, {"prompts": [[token, ...], ...], "new_tokens": N}, and prints the seconds that prompts and
answers took. All sequences are one batch of llama.cpp; every step is one `llama_decode`, greedy, without an end token.
Of {"text": [token, ...], "logits": FILE} it writes the logits [tokens, vocabulary] as a .npy file. With a third
argument the model is first rewritten to that file in 8 bits.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time

import llama_cpp as llama
import numpy


def add(batch: llama.llama_batch, token: int, position: int, row: int, wanted: bool) -> None:
    i = batch.n_tokens
    batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
    batch.seq_id[i][0], batch.logits[i] = row, wanted
    batch.n_tokens += 1


def decode(context: object, batch: llama.llama_batch) -> None:
    if llama.llama_decode(context, batch):
        raise RuntimeError("llama_decode failed")


def likeliest(context: object, place: int, vocabulary: int) -> int:
    logits = llama.llama_get_logits_ith(context, place)
    return int(numpy.ctypeslib.as_array(logits, (vocabulary,)).argmax())


def context_of(model: object, tokens: int, rows: int, threads: int) -> object:
    params = llama.llama_context_default_params()
    params.n_ctx = tokens
    params.n_batch = params.n_ubatch = 2048
    params.n_seq_max = rows
    params.n_threads = params.n_threads_batch = threads
    params.kv_unified = True
    return llama.llama_init_from_model(model, params)


def write_logits(context: object, text: list[int], vocabulary: int, path: str) -> None:
    batch = llama.llama_batch_init(len(text), 0, 1)
    for position, token in enumerate(text):
        add(batch, token, position, 0, True)
    decode(context, batch)
    shape = (len(text), vocabulary)
    numpy.save(path, numpy.ctypeslib.as_array(llama.llama_get_logits(context), shape))
    llama.llama_batch_free(batch)


def main(path: str, threads: int, eight_bits: str | None = None) -> None:
    llama.llama_backend_init()
    silent = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(silent, ctypes.c_void_p(0))
    if eight_bits is not None:
        options = llama.llama_model_quantize_default_params()
        options.ftype, options.allow_requantize = llama.LLAMA_FTYPE_MOSTLY_Q8_0, True
        if llama.llama_model_quantize(path.encode(), eight_bits.encode(), ctypes.byref(options)):
            raise RuntimeError(f"llama_model_quantize failed for {path}")
        path = eight_bits
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    print(
        json.dumps({"llama_cpp": llama.__version__, "system": llama.llama_print_system_info().decode()}),
        flush=True,
    )
    for line in sys.stdin:
        request = json.loads(line)
        if "text" in request:
            context = context_of(model, len(request["text"]) + 32, 1, threads)
            write_logits(context, request["text"], vocabulary, request["logits"])
            llama.llama_free(context)
            print(json.dumps({"bytes": os.path.getsize(path)}), flush=True)
            continue
        prompts, new_tokens = request["prompts"], request["new_tokens"]
        longest = max(map(len, prompts)) + new_tokens + 32
        context = context_of(model, len(prompts) * longest, len(prompts), threads)
        batch = llama.llama_batch_init(sum(map(len, prompts)), 0, 1)

        start = time.perf_counter()
        ends = []
        for row, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                add(batch, token, position, row, position + 1 == len(prompt))
            ends.append(batch.n_tokens - 1)
        decode(context, batch)
        made: list[list[int]] = [[] for _ in prompts]
        read = time.perf_counter()
        for step in range(new_tokens):
            tokens = [likeliest(context, end, vocabulary) for end in ends]
            for row, token in enumerate(tokens):
                made[row].append(token)
            if step + 1 == new_tokens:
                break
            batch.n_tokens = 0
            for row, token in enumerate(tokens):
                add(batch, token, len(prompts[row]) + step, row, True)
            ends = list(range(len(prompts)))
            decode(context, batch)
        end = time.perf_counter()
        llama.llama_batch_free(batch)
        llama.llama_free(context)
        print(json.dumps({"seconds": end - start, "prompt_seconds": read - start, "first": made[0][:8]}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
