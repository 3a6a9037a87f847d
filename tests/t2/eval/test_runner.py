from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

import t2
from t2.adaptation import (
    ClassifierStrategy,
    FewShotOptions,
    FewShotStrategy,
    PromptStrategy,
    few_shot_problems,
    two_pass,
)
from t2.eval import measure
from t2.eval import runner as module
from t2.eval.lora_adapter import LoraAdapter
from t2.eval.sections import dispatched
from t2.eval.spec import parse_spec
from t2.generation.evaluate import evaluate
from t2.tasks import get
from t2.tasks.statistics import paired_p, wilson_interval


@pytest.fixture
def calls(monkeypatch):
    """What was computed, not read: (what, label or columns) in order."""
    made = []

    def counted(what, function, name):
        def wrapper(*args, **kwargs):
            made.append((what, name(*args)))
            return function(*args, **kwargs)

        return wrapper

    answered = counted("answers", module.evaluate_experts, lambda svf, experts, task, *_: (len(experts), task.name))
    monkeypatch.setattr(module, "evaluate_experts", answered)
    monkeypatch.setattr(
        FewShotStrategy,
        "evaluate",
        counted("search", FewShotStrategy.evaluate, lambda self, candidates: self.task.name),
    )
    for kind in (PromptStrategy,):
        monkeypatch.setattr(
            kind, "label_scores", counted("labels", kind.label_scores, lambda self, prompts: (self.name, len(prompts)))
        )
    return made


def alone(running, label, name):
    """Scores of one expert by itself, one prompt after the other."""
    judged = running.task(label)

    def answer(prompts, room):
        found = []
        for prompt in prompts:
            out = running.svf.generate(prompt[None], experts=[name], max_new_tokens=room, do_sample=False)
            found.append(out[0, len(prompt) :])
        return found

    found = evaluate(answer, judged.task, judged.problems, running.tokenizer, new_tokens=judged.new_tokens)
    return list(found.scores)


def test_columns_are_each_expert_evaluated_alone(measuring, plan):
    running = measuring()
    found = measure(running, ["table1", "table2"])
    several = set()
    for label in plan.tasks:
        expected = {name: alone(running, label, choice) for name, choice in (("base", None), ("a", "a"), ("d", "d"))}
        several.add(len({tuple(scores) for scores in expected.values()}))
        base = sum(expected["base"]) / 8
        if label in plan.seen:
            columns = found["table1"][label]["columns"]
            assert {name: each["scores"] for name, each in columns.items()} == expected
            assert columns["a"]["accuracy"] == pytest.approx(sum(expected["a"]) / 8)
            assert columns["a"]["interval"] == list(wilson_interval(sum(expected["a"]) / 8, 8))
            assert columns["a"]["normalised"] == (pytest.approx(sum(expected["a"]) / 8 / base) if base else None)
            assert columns["a"]["p"] == paired_p(expected["base"], expected["a"])
        columns = found["table2"][label]["columns"]
        assert columns["base"]["scores"] == expected["base"]
        assert ("right expert" in columns) == (label in plan.seen)
        if label in plan.seen:
            assert columns["right expert"]["scores"] == expected[label]
        assert list(columns)[-4:] == ["prompt", "prompt, uncalibrated", "classifier", "few-shot 4"]
    assert max(several) > 1  # the experts do differ


def test_dispatched_columns_are_real_two_pass_answers(measuring, plan):
    running = measuring()
    columns = measure(running, ["table2"])["table2"]
    chosen = set()
    for label in plan.tasks:
        judged = running.task(label)
        for name, kind in (("prompt", PromptStrategy), ("classifier", ClassifierStrategy)):
            strategy = kind(running.svf, running.tokenizer, running.bank.domains)
            both = two_pass(
                running.svf, running.tokenizer, judged.problems, strategy, max_new_tokens=4, do_sample=False
            )
            assert columns[label]["columns"][name]["scores"] == judged.task.scores(judged.problems, both.answers)
            labels = [both.adaptation.names[i] for i in both.adaptation.alpha.argmax(-1).tolist()]
            assert running.labels(label)[name] == labels
            chosen |= set(labels)
    assert len(chosen) > 1
    assert dispatched(["a", "base", "d"], {"base": [0, 1, 0], "a": [2, 0, 0], "d": [0, 0, 3]}) == [2, 1, 3]


def test_the_few_shot_column_is_the_search_of_the_train_split(measuring, plan):
    running = measuring()
    found = measure(running, ["table2", "alphas", "sizes"])
    for label in plan.tasks:
        judged = running.task(label)
        problems = few_shot_problems(judged.task, 4, split="train", seed=0)
        options = FewShotOptions(population=10, generations=2, seed=0)
        strategy = FewShotStrategy(
            running.svf, running.tokenizer, judged.task, problems, options=options, experts=["a", "d"]
        )
        result = strategy.search()
        assert found["alphas"][label]["mean_alpha"] == result.mean_alpha
        assert torch.equal(running.mix(found["alphas"][label]), strategy.expert().z)
        assert found["table2"][label]["columns"]["few-shot 4"]["scores"] == alone(running, label, strategy.expert().z)
    assert list(found["sizes"]) == ["new"] and list(found["sizes"]["new"]["sizes"]) == ["2", "4"]
    row = found["sizes"]["new"]["sizes"]["4"]
    assert [each["seed"] for each in row] == [0, 1]
    assert row[0]["scores"] == found["table2"]["new"]["columns"]["few-shot 4"]["scores"]


def test_a_margin_leaves_the_base(measuring, content):
    cautious = parse_spec(content | {"search": content["search"] | {"margin": 100.0}})
    taken, kept = (measure(measuring(plan), ["alphas"])["alphas"] for plan in (parse_spec(content), cautious))
    assert any(each["mean_alpha"]["base"] < 1 for each in taken.values())
    for each in kept.values():
        assert [name for name, weight in each["mean_alpha"].items() if weight] == ["base"]
        assert each["score"] == each["singles"]["base"]


@pytest.mark.parametrize("granularity", ["model", "layer"])
def test_each_incumbent_has_columns_from_the_same_search(measuring, content, calls, granularity, monkeypatch):
    likely = torch.tensor([[0.0, -2.0, 3.0]])  # "d"
    monkeypatch.setattr(ClassifierStrategy, "label_scores", lambda self, prompts: likely.repeat(len(prompts), 1))
    content = content | {"few_shot_per_layer": granularity == "layer"}
    plain = measure(measuring(parse_spec(content)), ["table2", "sizes"])
    searches = [call for call in calls if call[0] == "search"]
    calls.clear()
    several = parse_spec(
        content | {"incumbents": ["base", "classifier"], "search": content["search"] | {"margin": 1.0}}
    )
    running = measuring(several)
    found = measure(running, ["table2", "sizes"])
    assert searches and not [call for call in calls if call[0] == "search"]
    suffix = ", per layer" if granularity == "layer" else ""
    kept = set()
    for label in several.tasks:
        columns = found["table2"][label]["columns"]
        assert set(columns) - set(plain["table2"][label]["columns"]) == {
            name for name in columns if name.startswith("classifier, few-shot 4")
        }
        judged = running.task(label)
        classifier = ClassifierStrategy(running.svf, running.tokenizer, running.bank.domains)
        for incumbent, name in (("base", "few-shot 4"), (classifier, "classifier, few-shot 4")):
            strategy = FewShotStrategy(
                running.svf,
                running.tokenizer,
                judged.task,
                few_shot_problems(judged.task, 4, split="train", seed=0),
                options=replace(several.search, seed=0, granularity=granularity),
                experts=["a", "d"],
                incumbent=incumbent,
            )
            assert columns[name + suffix]["scores"] == alone(running, label, strategy.expert().z)
            assert strategy.search().incumbent == ("base" if incumbent == "base" else "d")
        kept.add(running.settled(label, 4, 0, "classifier", granularity)["kept"])
    assert kept > {"d"}  # not always the same way
    assert list(found["sizes"]) == ["new", "classifier, new"]
    row = found["sizes"]["classifier, new"]["sizes"]["4"]
    if granularity == "model":
        assert row[0]["scores"] == found["table2"]["new"]["columns"]["classifier, few-shot 4"]["scores"]


def test_the_incumbent_of_a_classifier_needs_one(measuring, content, bank):
    plan = parse_spec(content | {"incumbents": ["classifier"], "search": content["search"] | {"margin": 1.0}})
    (bank / "classifier.safetensors").unlink()
    with pytest.raises(ValueError, match="incumbents: expected a bank with a classification expert"):
        measuring(plan)


def test_all_columns_of_a_task_are_one_batch_and_nothing_is_computed_twice(measuring, plan, calls):
    first = measure(measuring())
    answered = [call for call in calls if call[0] == "answers"]
    assert len(answered) == 3 and max(count for _, (count, _) in answered) > 3
    calls.clear()
    assert measure(measuring()) == first
    assert calls == []
    assert set(first) == {"table1", "table2", "dispatch", "times", "alphas", "sizes"}
    assert measure(measuring(), ["table1"]) == first  # what is there is told, too
    assert calls == []


def test_sections_that_were_not_asked_for_are_not_measured(measuring, calls):
    assert set(measure(measuring(), ["table1"])) == {"table1"}
    assert [call[0] for call in calls] == ["answers"] * 2
    with pytest.raises(ValueError, match=r"only: expected some of table1, .*, got table3"):
        measure(measuring(), ["table3"])


def test_an_interrupted_run_goes_on(measuring, plan, calls, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 3)
    inner, answered = module.evaluate_experts, []

    def interrupted(*args, **kwargs):
        answered.append(len(args[3]))
        if len(answered) == 5:
            raise KeyboardInterrupt
        return inner(*args, **kwargs)

    monkeypatch.setattr(module, "evaluate_experts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(measuring(), ["table1"])
    assert answered == [3, 3, 2, 3, 3]
    found = measure(measuring(), ["table1"])
    assert answered[5:] == [3, 2]
    monkeypatch.setattr(module, "CHUNK", 50)
    assert measure(measuring(), ["table1"]) == found
    assert len(calls) == 8  # without a part's size in common, everything again


def test_another_expert_of_a_name_is_measured_anew_and_no_other(measuring, bank, calls):
    measure(measuring(), ["table1", "dispatch"])
    calls.clear()
    expert = t2.Expert.load(bank / "d.safetensors")
    t2.Expert.random(expert.layout, std=2.0, seed=9).save(bank / "d.safetensors")
    running = measuring()
    found = measure(running, ["table1", "dispatch"])
    assert [(what, name[0]) for what, name in calls] == [("answers", 1), ("answers", 1)]  # not the labels either
    assert found["table1"]["a"]["columns"]["d"]["scores"] == alone(running, "a", "d")
    calls.clear()
    expert.save(bank / "classifier.safetensors")
    measure(measuring(), ["table1", "dispatch"])
    assert calls == [("labels", ("classifier", 8))] * 3
    expert.save(bank / "d.safetensors")
    calls.clear()
    measure(measuring(), ["table1"])
    assert calls == []  # as at first


def test_a_changed_plan_measures_what_it_touches(measuring, content, calls):
    measure(measuring(), ["table1"])
    calls.clear()
    other = copy.deepcopy(content)
    other["seen"]["d"]["max_new_tokens"] = 2
    other["dispatch_prompts"] = 4
    measure(measuring(parse_spec(other)), ["table1"])
    assert calls == [("answers", (3, get(content["seen"]["d"]["task"], **content["seen"]["d"]["options"]).name))]


def test_the_confusion_matrix_counts_the_labels(measuring, plan):
    running = measuring()
    found = measure(running, ["dispatch"])["dispatch"]
    assert found["labels"] == ["a", "d", "others"]
    for strategy, parts in found["strategies"].items():
        right = 0
        for label in plan.seen:
            said = running.labels(label)[strategy][:4]
            row = parts["seen"]["matrix"][label]
            assert row == [said.count("a"), said.count("d"), said.count("base")]
            right += said.count(label)
        assert parts["seen"]["accuracy"] == right / 8 and parts["seen"]["prompts"] == 8
        said = running.labels("new")[strategy]
        assert parts["others"]["accuracy"] == said.count("base") / 8 and parts["others"]["prompts"] == 8


def test_times_of_both_passes(measuring, plan):
    found = measure(measuring(), ["times"])["times"]
    assert list(found) == ["mixed batch", "a", "d", "new"]
    for each in found.values():
        assert each["requests"] == 4 and each["new_tokens"] == 4
        assert list(each["seconds"]) == ["base", "prompt", "classifier"]
        assert len(each["seconds"]["base"]) == 2 and min(each["seconds"]["base"]) > 0
        assert all(len(each["seconds"]["prompt"][which]) == 2 for which in ("first", "second"))


def test_an_adapter_is_a_column(measuring, plan, folder, tmp_path):
    model, tokenizer = t2.load(folder)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora" in name:
            parameter.data.normal_(std=2.0)
    adapted.eval().save_pretrained(tmp_path / "lora")
    running = measuring(replace(plan, lora="x"), adapter=LoraAdapter(str(folder), tmp_path / "lora"))
    found = measure(running, ["table1"])["table1"]
    differs = False
    for label in plan.seen:
        judged = running.task(label)

        def answer(prompts, room):
            rows = (
                adapted.generate(input_ids=p[None], max_new_tokens=room, do_sample=False)[0, len(p) :] for p in prompts
            )
            return list(rows)

        expected = evaluate(answer, judged.task, judged.problems, tokenizer)
        columns = found[label]["columns"]
        assert columns["LoRA"]["scores"] == list(expected.scores)
        differs |= columns["LoRA"]["scores"] != columns["base"]["scores"]
    assert differs
    (tmp_path / "lora" / "adapter_model.safetensors").rename(tmp_path / "lora" / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"lora: expected a folder with .*adapter_model.safetensors"):
        LoraAdapter(str(folder), tmp_path / "lora")


def test_variants_of_fewer_matrices(measuring, content, folder, tmp_path):
    model, _ = t2.load(folder)
    mlp = t2.SVFModel(model, t2.SVFConfig("mlp", progress=False))
    expert = t2.Expert.random(mlp.layout, std=2.0, seed=3)
    expert.save(tmp_path / "mlp.safetensors")
    content["variants"] = {"mlp": {"a": str(tmp_path / "mlp.safetensors")}}
    running = measuring(parse_spec(content))
    found = measure(running, ["variants"])["variants"]
    assert list(found) == ["a"] and list(found["a"]["columns"]) == ["base", "expert of the bank", "mlp"]
    mlp.add_expert("mlp", expert)
    judged = running.task("a")
    out = [
        mlp.generate(module.encode(p, running.tokenizer)[None], experts=["mlp"], max_new_tokens=4)
        for p in judged.problems
    ]
    texts = [
        running.tokenizer.decode(row[0, len(module.encode(p, running.tokenizer)) :], skip_special_tokens=True)
        for row, p in zip(out, judged.problems, strict=True)
    ]
    assert found["a"]["columns"]["mlp"]["scores"] == judged.task.scores(judged.problems, texts)
    other = t2.Layout(expert.layout.names, expert.layout.ranks, "0" * 64, "other")
    t2.Expert(expert.z, other).save(tmp_path / "mlp.safetensors")
    with pytest.raises(ValueError, match=r"variants.mlp.a: expected an expert of matrices of this model"):
        measure(measuring(parse_spec(content)), ["variants"])
    (tmp_path / "mlp.safetensors").unlink()
    assert set(measure(measuring(parse_spec(content)), ["table1"])) == {"table1"}


def test_few_shot_problems_of_a_task_with_a_test_split_alone(measuring, content):
    content["unseen"]["new"]["few_shot_from"] = "test"
    judged = measuring(parse_spec(content)).task("new")
    drawn = judged.few_shot(3, 0)
    assert len(drawn) == 3 and not set(map(id, drawn)) & set(map(id, judged.problems))
    with pytest.raises(ValueError, match="new: few_shot_from test: few_shot: expected 1 to"):
        judged.few_shot(1000, 0)


def test_a_seen_task_needs_its_expert(measuring, content):
    content["seen"]["x"] = content["seen"].pop("d")
    with pytest.raises(ValueError, match=r"seen: expected names of experts \(a, d\), got x"):
        measuring(parse_spec(content))
