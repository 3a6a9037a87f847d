"""Plants bugs, one at a time, in a copy of the packages and checks that a test fails for each.

    python -m tests.planted_bugs                     # all of them, a few minutes; those of csrc build the extension
    python -m tests.planted_bugs --only csrc planner # those whose package or name contains one of these texts

Each bug replaces one text, which has to be in its file exactly once, and is run with the few tests that should notice.
Prints a table; exit code 1 if a text is not found or no test fails.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("t2", "t2kernels")
LONGEST = 600
"""Seconds that the tests of one bug may take."""


@dataclass(frozen=True)
class Bug:
    """A mistake to plant.

    name: the mistake, in a few words.
    file: where, from the root of the repository.
    before, after: the text there, and what takes its place.
    tests: arguments of pytest, without "tests/" before paths.
    """

    name: str
    file: str
    before: str
    after: str
    tests: str

    @property
    def compiled(self) -> bool:
        """Whether the extension has to be built for it."""
        return self.file.startswith("csrc/")


BUGS = (
    # t2, several processes and checkpoints
    Bug(
        "processes keep their own part of z's gradient",
        "t2/model/tensor_parallel.py",
        "return ctx.division.summed(gradient.clone()), None",
        "return gradient, None",
        "t2/processes/test_divided.py",
    ),
    Bug(
        "every process adds the bias of a layer divided by columns",
        "t2/model/tensor_parallel.py",
        "y = _Sum.apply(product(x, scales, slots, None), self)",
        "y = _Sum.apply(product(x, scales, slots, bias), self)",
        "t2/processes/test_divided.py",
    ),
    Bug(
        "a divided layer hands its part on to one that is whole",
        "t2/model/tensor_parallel.py",
        "            style = _WHOLE.get(style, style)",
        "            style = style",
        "t2/processes/test_divided.py",
    ),
    Bug(
        "heads of attention are divided",
        "t2/model/tensor_parallel.py",
        "if styles[name] in _WHOLE and size % (mesh.size() * _unit(model, name)):",
        "if styles[name] in _WHOLE and size % mesh.size():",
        "t2/processes/test_divided.py",
    ),
    Bug(
        "batches that fill up a process count as tokens",
        "t2/training/trainer.py",
        "PromptGroup(token, (token,), (0.0,), (0,))",
        "PromptGroup(token, (token,), (0.0,), (1,))",
        "t2/training/test_trainer.py -k several_processes",
    ),
    Bug(
        "tokens of Llama 4's experts run with others' slots",
        "t2/model/moe.py",
        "sent % max(1, tokens), tokens)",
        "sent // max(1, tokens), tokens)",
        "t2/model/test_moe.py -k llama4",
    ),
    Bug(
        "a streamed mixture takes gate for up",
        "t2/weights/tensor_names.py",
        "key = converter.source_patterns.index(pattern), int(number[1])",
        "key = len(converter.source_patterns) - 1 - converter.source_patterns.index(pattern), int(number[1])",
        "t2/model/test_moe.py -k streams",
    ),
    Bug(
        "rows of a streamed expert are taken before it is transposed",
        "t2/weights/shards.py",
        "        return weight if self.rows is None else weight[self.rows]",
        "        return weight if self.rows is None else weight[: len(range(weight.shape[0])[self.rows])]",
        "t2/model/test_moe.py -k streams",
    ),
    Bug(
        "a layer that was given another forward counts as plain",
        "t2/weights/quantized.py",
        "            return not torch.equal(y, type(layer).forward(layer, x))",
        "            return False",
        "t2/model/test_quantized.py",
    ),
    Bug(
        "brackets in strings make JSON deep",
        "t2kernels/files.py",
        'if text[token.start()] in "[{":',
        'if set(token[0]) & set("[{"):',
        "t2/weights/test_files.py",
    ),
    # t2kernels
    Bug(
        "outputs of kept groups lose their biases",
        "csrc/binding.cpp",
        "if (const Tensor* bias = group.bias(l)) set_bias(out, *bias, kept->out_features[l]);",
        "",
        "t2kernels/test_kept_group.py",
    ),
    Bug(
        "a kept group is never released",
        "t2kernels/weights.py",
        "        weakref.finalize(self, extension.release_group, self._number)\n",
        "",
        "t2kernels/test_kept_group.py",
    ),
    Bug(
        "tokens in a mixture take another request's slot",
        "t2/model/moe.py",
        "slots[rows // max(1, tokens // max(1, self.route.requests))]",
        "slots[rows % max(1, self.route.requests)]",
        "t2/model/test_moe.py",
    ),
    Bug(
        "gate and up change places in a model that is given back",
        "t2/weights/fused_experts.py",
        "zip(self._halves(both.shape[0]), (gate, up), strict=True)",
        "zip(self._halves(both.shape[0]), (up, gate), strict=True)",
        "t2/model/test_moe.py",
    ),
    Bug(
        "experts of a mixture write their rows over each other",
        "csrc/binding.cpp",
        "*kept_group(groups[i]), y, first);",
        "*kept_group(groups[i]), y, 0);",
        "t2kernels/test_kept_group.py",
    ),
    # t2, quantised bases, options, patience
    Bug(
        "a quantised layer's bias is taken for a part of its matrix",
        "t2/weights/quantized.py",
        "            layer.bias = None  # type: ignore[assignment] # what it adds would round small weights\n",
        "            pass\n",
        "t2/model/test_quantized.py",
    ),
    Bug(
        "the gradient of a quantised layer is trusted",
        "t2/weights/quantized.py",
        "            if _close(dx.float(), want):",
        "            if dx is not None:",
        "t2/model/test_quantized.py",
    ),
    Bug(
        "hooks of a quantised layer run twice",
        "t2/weights/quantized.py",
        "            y: Tensor = self.module.forward(x)\n            return y\n        if self._backward is None:",
        "            y: Tensor = self.module(x)\n            return y\n        if self._backward is None:",
        "t2/model/test_quantized.py",
    ),
    Bug(
        "options of a file win over the command line",
        "t2/cli/options_file.py",
        "        if name in said or value is None:",
        "        if value is None:",
        "t2/cli/test_options_file.py",
    ),
    Bug(
        "patience ends a cold start",
        "t2/training/trainer.py",
        "max(self.state.best_step, options.cold_start_steps)",
        "self.state.best_step",
        "t2/training/test_trainer.py",
    ),
    # t2, mixes, banks, integrations
    Bug(
        "mixes of experts on a support leave it by rounding",
        "t2/experts/mixes.py",
        "torch.where((total - 1).abs() < 1e-6, 1.0, total).float()",
        "total.float()",
        "t2/experts/test_mixes.py",
    ),
    Bug(
        "adapters for vLLM hold z - 1 in two parts",
        "t2/integrations/vllm/bank.py",
        "    for _ in range(ROWS):",
        "    for _ in range(ROWS - 1):",
        "t2/integrations/test_vllm_bank.py",
    ),
    Bug(
        "names of experts lead out of the bank",
        "t2/integrations/vllm/bank.py",
        'Path(name).name == name and not name.startswith(".")',
        "True",
        "t2/integrations/test_vllm_bank.py",
    ),
    Bug(
        "clients that vLLM refuses may choose experts",
        "t2/integrations/vllm/bank_middleware.py",
        '        if messages and messages[0]["status"] == 200:\n            return True',
        "        if messages:\n            return True",
        "t2/integrations/test_vllm_bank.py",
    ),
    Bug(
        "a failed addition leaves a bank behind",
        "t2/adaptation/bank_edit.py",
        "    domains = _domains(folder) if folder.exists() else {}",
        "    folder.exists() or init_bank(folder)\n    domains = _domains(folder)",
        "t2/adaptation/test_bank_edit.py",
    ),
    Bug(
        "replicas keep experts that are gone",
        "t2/integrations/ray.py",
        "[name for name in known if name not in stamps]",
        "[]",
        "t2/integrations/test_ray.py -k keeper",
    ),
    Bug(
        "int8 storage cuts fractions off instead of rounding",
        "t2kernels/packing.py",
        "(steps.round() if dtype == torch.int8 else steps)",
        "steps",
        "t2kernels/test_kernels.py -k pack_rounds",
    ),
    Bug(
        "the scale of vh is left out of int8 components",
        "t2kernels/weights.py",
        "u_scale * vh_scale])",
        "u_scale])",
        "t2kernels/test_kernels.py -k pack_rounds",
    ),
    Bug(
        "the reference's gradient of scales lacks int8 scales",
        "t2kernels/reference.py",
        "th = t * h if component_scale is None else t * h * component_scale",
        "th = t * h",
        "t2kernels/test_torch_integration.py -k reference_operators",
    ),
    Bug(
        "the reference scores attention without its scale",
        "t2kernels/reference.py",
        "key.to(wide).transpose(-1, -2) * scale",
        "key.to(wide).transpose(-1, -2)",
        "t2kernels/test_attention_op.py -k float64",
    ),
    Bug(
        "the gradient of the bias is the mean over rows",
        "t2kernels/ops.py",
        "return rows.sum(0, dtype=torch.float32)",
        "return rows.mean(0, dtype=torch.float32)",
        "t2kernels/test_kernels.py -k backward_against",
    ),
    Bug(
        "an operator's saved factors are taken from the wrong half",
        "t2kernels/ops.py",
        "vh = ctx.saved_tensors[6 + ctx.parts :]",
        "vh = ctx.saved_tensors[6 : 6 + ctx.parts]",
        "t2kernels/test_torch_integration.py -k opcheck",
    ),
    Bug(
        "costs between measured rows are weighed by the wrong width",
        "t2kernels/planner.py",
        "/ (ROWS[i] - ROWS[i - 1])",
        "/ ROWS[i]",
        "t2kernels/test_planner.py",
    ),
    Bug(
        "the error of delta-k is compared with a bound that is not squared",
        "t2kernels/planner.py",
        "(worst > max_weight_error**2)",
        "(worst > max_weight_error)",
        "t2kernels/test_planner.py",
    ),
    Bug(
        "blocks of 4 bits take the range's scale, never a fit",
        "t2kernels/packing.py",
        "torch.where(error < best[0], *pair)",
        "torch.where(error < 0, *pair)",
        "t2kernels/test_blocks.py -k four_bits_lose",
    ),
    # t2.model
    Bug(
        "the gradient of an expert in training lacks sigma",
        "t2/model/routing.py",
        "return gradient.squeeze(0) * ctx.sigma, None",
        "return gradient.squeeze(0), None",
        "t2/model/test_routing.py",
    ),
    Bug(
        "rows that are no multiple of the requests are not refused",
        "t2/model/routing.py",
        "if rows % self.requests if self.requests else rows:",
        "if rows < self.requests:",
        "t2/model/test_routing.py",
    ),
    Bug(
        "a backward pass reads slots that the next batch has overwritten",
        "t2/model/layers.py",
        "slots = route.kept_slots",
        "slots = route.slots",
        "t2/model/test_routing.py",
    ),
    Bug(
        "new tokens overwrite the last one of the cache",
        "t2/model/kv_cache.py",
        "buffer[..., old:length, :] = new",
        "buffer[..., max(old - 1, 0) : length - 1, :] = new",
        "t2/model/test_kv_cache.py",
    ),
    Bug(
        "delta-k adds the base's components a second time",
        "t2/model/serving_plan.py",
        "scales = table[:, self.columns] - self.sigma",
        "scales = table[:, self.columns]",
        "t2/model/test_serving_plan.py -k delta",
    ),
    Bug(
        "one token off does not count in a model without routers",
        "t2/model/verify.py",
        "share > (0.0 if exact else 0.25)",
        "share > 0.25",
        "t2/model/test_verify.py -k token_off",
    ),
    Bug(
        "decode attention runs where key heads do not divide the heads",
        "t2/model/attention.py",
        "and heads % key.shape[1] == 0",
        "and key.shape[1] <= heads",
        "t2/model/test_attention.py",
    ),
    Bug(
        "experts are ignored by generate",
        "t2/model/svf_model.py",
        "held.enter_context(self.route(experts, plan))",
        "held.enter_context(self.router.held())",
        "t2/model/test_svf_model.py -k generat",
    ),
    Bug(
        "a token of the engine does not look at itself",
        "t2/generation/row_cache.py",
        "ends = places.positions + 1",
        "ends = places.positions",
        "t2/generation/test_engine.py -k windows_of_keys",
    ),
    # t2.experts
    Bug(
        "the slot of the base is free",
        "t2/experts/slots.py",
        "self._references = [1] + [0] * (slots - 1)",
        "self._references = [0] * slots",
        "t2/model/test_svf_model.py -k 'merged_models or slot'",
    ),
    Bug(
        "a replaced expert keeps its slot for ever",
        "t2/experts/registry.py",
        "                self._table.release(before)",
        "                pass",
        "t2/experts/test_registry.py",
    ),
    Bug(
        "a matrix's window ends by the rank of the first one",
        "t2/experts/layout.py",
        "self.offsets[index] + self.ranks[index])",
        "self.offsets[index] + self.ranks[0])",
        "t2/experts/test_expert.py",
    ),
    Bug(
        "layers of another depth are matched by their first line, not their middle",
        "t2/experts/transfer.py",
        "(2 * layer + 1) * deep[stack] // (2 * target_deep[place.stack])",
        "layer * deep[stack] // target_deep[place.stack]",
        "t2/experts/test_transfer.py",
    ),
    # t2.weights
    Bug(
        "factors of another matrix pass the checksum",
        "t2/weights/factor_cache.py",
        "xxhash.xxh3_128(key.encode())",
        "xxhash.xxh3_128(b'')",
        "t2/weights/test_factor_cache.py",
    ),
    Bug(
        "tensors that are not contiguous are saved as they are",
        "t2/weights/files.py",
        "name: tensor.contiguous() for name",
        "name: tensor for name",
        "t2/weights/test_files.py",
    ),
    Bug(
        "prompts are padded on the right",
        "t2/weights/loading.py",
        'words.padding_side = "left"',
        'words.padding_side = "right"',
        "t2/weights/test_loading.py",
    ),
    Bug(
        "a suffix matches within a name",
        "t2/weights/targets.py",
        'name.endswith(f".{suffix}")',
        "name.endswith(suffix)",
        "t2/weights/test_targets.py",
    ),
    Bug(
        "streamed matrices of GPT-2 are not transposed",
        "t2/weights/streaming.py",
        "layer.weight.dtype, not isinstance(layer, nn.Linear))",
        "layer.weight.dtype, False)",
        "t2/weights/test_streaming.py",
    ),
    # t2.generation
    Bug(
        "rows that are left draw the numbers of those that have gone",
        "t2/generation/decode.py",
        "self.uniforms[rows, place]",
        "self.uniforms[: len(rows), place]",
        "t2/training/test_rollouts.py",
    ),
    Bug(
        "rows that are left run with the experts of those that have gone",
        "t2/generation/decode.py",
        "rows[:] = [rows[place] for place in kept.tolist()]",
        "rows[:] = rows[: len(kept)]",
        "t2/experts/test_transfer.py t2/adaptation/test_few_shot.py",
    ),
    Bug(
        "a batch holds one row more than its budget",
        "t2/generation/batching.py",
        "(end + 1 - start) * lengths[order[end]]",
        "(end - start) * lengths[order[end]]",
        "t2/generation/test_batching.py",
    ),
    Bug(
        "a prefix may be the whole of a prompt",
        "t2/generation/batching.py",
        "length = min(len(prompt) for prompt in prompts) - 1",
        "length = min(len(prompt) for prompt in prompts)",
        "t2/training/test_rollouts.py",
    ),
    Bug(
        "tokens are drawn behind the wrong block",
        "t2/generation/sampling.py",
        "rest = below - (cumulated - mass).gather(1, block)",
        "rest = below - cumulated.gather(1, block)",
        "t2/training/test_rollouts.py",
    ),
    Bug(
        "micro-batches forget the prompt's tokens",
        "t2/generation/scoring.py",
        "(token_budget - prompt) // group.longest",
        "token_budget // group.longest",
        "t2/training/test_rollouts.py",
    ),
    # t2.adaptation
    Bug(
        "the prior is added instead of taken off",
        "t2/adaptation/dispatch.py",
        "scores - self._prior(scores)",
        "scores + self._prior(scores)",
        "t2/adaptation/test_dispatch.py",
    ),
    Bug(
        "likelihoods of wrong answers break ties too",
        "t2/adaptation/few_shot.py",
        " if score == 1.0]",
        "]",
        "t2/adaptation/test_few_shot.py",
    ),
    Bug(
        "the worst candidates are the elites",
        "t2/adaptation/search.py",
        "pool.sort(key=lambda entry: entry[0], reverse=True)",
        "pool.sort(key=lambda entry: entry[0])",
        "t2/adaptation/test_search.py",
    ),
    # t2.training
    Bug(
        "leave-one-out scales the wrong way",
        "t2/training/loss.py",
        "values * (samples / (samples - 1))",
        "values * ((samples - 1) / samples)",
        "t2/training/test_loss.py",
    ),
    Bug(
        "the KL's gradient ignores repeated answers",
        "t2/training/loss.py",
        "ratio.sub_(kl).mul_(counts)",
        "ratio.sub_(kl)",
        "t2/training/test_loss.py",
    ),
    Bug(
        "the first warm-up step has a rate of 0",
        "t2/training/trainer.py",
        "rate *= (step + 1) / options.warmup_steps",
        "rate *= step / options.warmup_steps",
        "t2/training/test_trainer.py -k warms_up",
    ),
    Bug(
        "a checkpoint of another base goes on",
        "t2/training/checkpoint.py",
        "(self.base.dtype, self.base.fingerprint) != (base.dtype, base.fingerprint)",
        "self.base.dtype != base.dtype",
        "t2/training/test_checkpoint.py",
    ),
    Bug(
        "a run goes on with another seed",
        "t2/training/options.py",
        '"save_every", "stream"}',
        '"save_every", "stream", "seed"}',
        "t2/training/test_options.py",
    ),
    # t2.eval
    Bug(
        "few-shot problems are among those that count",
        "t2/eval/runner.py",
        'if self.few_shot_from == "test" else 0',
        'if self.few_shot_from == "train" else 0',
        "t2/eval/test_runner.py -k few_shot",
    ),
    Bug(
        "better and worse change places",
        "t2/eval/sections.py",
        "better_worse(base, scores)",
        "better_worse(scores, base)",
        "t2/eval/test_sections.py",
    ),
    # t2.tasks
    Bug(
        "Wilson's interval divides by the count once too few",
        "t2/tasks/statistics.py",
        "(4 * count * count)",
        "(4 * count)",
        "t2/tasks/test_statistics.py",
    ),
    Bug(
        "a label that begins with a shorter one is never found",
        "t2/tasks/classify.py",
        "sorted(labels, key=len, reverse=True)",
        "sorted(labels, key=len)",
        "t2/tasks/test_classify.py",
    ),
    Bug(
        "a reward of exactly 1 is no success",
        "t2/tasks/jsonl.py",
        "float(reward >= 1)",
        "float(reward > 1)",
        "t2/tasks/test_jsonl.py",
    ),
    # t2.sandbox
    Bug(
        "True travels as False",
        "t2/sandbox/wire.py",
        'out.extend(b"T")',
        'out.extend(b"F")',
        "t2/sandbox/test_verdicts.py",
    ),
    # t2.integrations
    Bug(
        "of several active adapters the last one counts alone",
        "t2/integrations/peft.py",
        "sum(offsets[1:], offsets[0])",
        "offsets[-1]",
        "t2/integrations/test_peft.py -k adapters_come",
    ),
    Bug(
        "a layer keeps the scales of another mixed batch",
        "t2/integrations/peft.py",
        "if self._kept is None or self._kept[0] is not mixed:",
        "if self._kept is None:",
        "t2/integrations/test_peft.py -k sees_changes",
    ),
    Bug(
        "a LoRA adapter of small rank takes the changes that are largest with their sign",
        "t2/integrations/export.py",
        "change.abs().topk(",
        "change.topk(",
        "t2/integrations/test_export.py -k smaller_rank",
    ),
    # t2.cli
    Bug(
        "several target modules are cut to the first",
        "t2/cli/options.py",
        "return targets[0] if len(targets) == 1 else list(targets)",
        "return targets[0]",
        "t2/cli",
    ),
    # csrc
    Bug(
        "the portable set forgets the bias",
        "csrc/cpu/portable.cpp",
        "v[i] = v[i] * scale[i] + bias[i];",
        "v[i] = v[i] * scale[i];",
        "t2kernels/test_kernels.py -k 'dense_weight and portable'",
    ),
    Bug(
        "the second part of int8 factors lands on the first",
        "csrc/binding.cpp",
        "columns(t, rank, first)));\n    first += f.down[i].n;\n",
        "columns(t, rank, first)));\n",
        "t2kernels/test_kernels.py -k 'factored_weight and int8'",
    ),
    Bug(
        "the minima of blocks are left out",
        "csrc/cpu/matmul_impl.h",
        "          sum.step(minima, Broadcast(scale + MR + r));\n",
        "",
        "t2kernels/test_blocks.py -k 'sums and portable'",
    ),
    Bug(
        "the upper bit of 8-bit codes is lost on AVX2",
        "csrc/cpu/avx2.cpp",
        "_mm256_maddubs_epi16(high, x), _mm256_set1_epi16(128)",
        "_mm256_maddubs_epi16(high, x), _mm256_set1_epi16(0)",
        "t2kernels/test_blocks.py -k 'sums and avx2 and uint8'",
    ),
    Bug(
        "keys that not all rows of a job look at are left out",
        "csrc/cpu/attention_impl.h",
        "    for (int64_t r = 0; r < rows; ++r) add(r, 1, all.end, own[r].end);\n",
        "",
        "t2kernels/test_attention_op.py -k share_keys",
    ),
    Bug(
        "the sums of sixteen lanes change places",
        "csrc/cpu/portable.cpp",
        "out[i] = c[i].sum();",
        "out[i] = c[15 - i].sum();",
        "t2kernels/test_attention_op.py -k 'float64 and portable'",
    ),
)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", nargs="+", default=[""], help="bugs whose file or name contains one of these")
    only = arguments.parse_args().only
    bugs = [bug for bug in BUGS if any(text in f"{bug.file} {bug.name}" for text in only)]
    if missing := [bug for bug in bugs if (ROOT / bug.file).read_text().count(bug.before) != 1]:
        print(*(f"{bug.file}: expected once: {bug.before!r}" for bug in missing), sep="\n")
        return 1
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", HF_HUB_OFFLINE="1", TRITON_INTERPRET="1")
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = _copy(Path(folder), with_sources=any(bug.compiled for bug in bugs))
        for number, bug in enumerate(bugs, 1):
            start = time.perf_counter()
            with _planted(bug, copy):
                found = _failing(bug, copy)
            missed += found is None
            seconds = time.perf_counter() - start
            print(f"{number:2}  {bug.file:32}{bug.name:70}{found or 'NOT CAUGHT'}  ({seconds:.0f} s)", flush=True)
    print(f"{len(bugs) - missed} of {len(bugs)} caught")
    return int(missed > 0)


def _copy(folder: Path, *, with_sources: bool) -> Path:
    """The packages, and what their extension is built from."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    if with_sources:
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder)
    return folder


@contextlib.contextmanager
def _planted(bug: Bug, copy: Path) -> Iterator[None]:
    path = copy / bug.file
    sound = path.read_text()
    path.write_text(sound.replace(bug.before, bug.after))
    extensions = {file: file.read_bytes() for file in (copy / "t2kernels").glob("_C*.so")} if bug.compiled else {}
    try:
        if bug.compiled:
            _build(copy)
        yield
    finally:
        path.write_text(sound)
        for file, content in extensions.items():
            file.unlink()  # a process may have it mapped
            file.write_bytes(content)


def _build(copy: Path) -> None:
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the extension was not built:\n{done.stderr[-2000:]}")


def _failing(bug: Bug, copy: Path) -> str | None:
    """The first test that fails, in a process that has torch and transformers but none of the packages."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "pytest"])
    mine, theirs = context.Pipe()
    process = context.Process(target=_run, args=(bug.tests, str(copy), theirs))
    process.start()
    theirs.close()
    try:
        if not mine.poll(LONGEST):
            process.kill()
            raise RuntimeError(f"{bug.name}: pytest {bug.tests} did not end within {LONGEST} s")
        code, failed = mine.recv()
    except EOFError:
        raise RuntimeError(f"{bug.name}: the tests' process died") from None
    finally:
        process.join()
    if code not in (0, 1):
        print(f"pytest {bug.tests} ended with exit code {code}")
    return failed if code == 1 else None


class _First:
    """A pytest plugin that notes the first failure."""

    failed: str | None = None

    def pytest_runtest_logreport(self, report: object) -> None:
        if getattr(report, "failed", False) and self.failed is None:
            self.failed = str(getattr(report, "nodeid", "")).removeprefix("tests/")


def _run(tests: str, copy: str, to: Connection) -> None:
    import pytest

    os.chdir(ROOT)
    sys.path[:] = [copy, *(path for path in sys.path if path != copy)]
    os.environ["PYTHONPATH"] = os.pathsep.join([copy, str(ROOT)])
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    words = [f"tests/{word}" if Path("tests", word).exists() else word for word in shlex.split(tests)]
    first = _First()
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", f"pythonpath={copy}"]
    code = pytest.main([*options, *words], plugins=[first])
    import t2kernels

    assert t2kernels.__file__.startswith(copy)
    to.send((int(code), first.failed))


if __name__ == "__main__":
    sys.exit(main())
