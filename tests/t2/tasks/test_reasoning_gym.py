from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from t2 import tasks
from t2.tasks.reasoning_gym import DRAWN_ANEW, DRAWN_BY_HASH, lenient

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}


def sums(**options):
    sizes = {"train_size": 300, "validation_size": 50, "test_size": 100}
    return tasks.get("reasoning-gym:chain_sum", **{"config": SUMS, **sizes, **options})


def questions(problems):
    return [problem.messages[-1]["content"] for problem in problems]


def test_splits_are_disjoint_without_repeats_and_of_the_sizes_asked_for():
    task = sums()
    splits = [questions(task.problems(split)) for split in ("train", "validation", "test")]
    assert [len(split) for split in splits] == [300, 50, 100]
    assert len(set().union(*splits)) == 450


def test_splits_are_the_same_in_every_process():
    code = """
from t2 import tasks
task = tasks.get("reasoning-gym:chain_sum", train_size=20, validation_size=5, test_size=5)
found = [p.messages[-1]["content"] for s in ("train", "validation", "test") for p in task.problems(s)]
"""
    here: dict[str, object] = {}
    exec(code, here)
    there = subprocess.run([sys.executable, "-c", code + "print(found)"], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == str(here["found"])


DRAWS = """
import json, sys
from pathlib import Path
from t2 import tasks
found = {}
for name in sys.argv[2:]:
    try:
        task = tasks.get(f"reasoning-gym:{name}", train_size=1, validation_size=1, test_size=10)
        found[name] = [[problem.messages[-1]["content"], problem.solution] for problem in task.problems("test")]
    except ValueError as error:
        found[name] = [str(error)]
Path(sys.argv[1]).write_text(json.dumps(found))
"""


def drawn(names, seed, folder):
    """The test problems of tasks, by name, in a process of that hash seed; or one text: why there are none."""
    file = folder / seed
    command = [sys.executable, "-c", DRAWS, str(file), *names]
    subprocess.run(command, capture_output=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
    return json.loads(file.read_text())


@pytest.mark.skipif(not sys.flags.hash_randomization, reason="this process has a fixed hash seed")
def test_tasks_that_draw_by_hash_are_refused_without_a_fixed_seed(tmp_path):
    for name in sorted(DRAWN_BY_HASH):
        with pytest.raises(ValueError, match="expected a process with the environment variable PYTHONHASHSEED=0"):
            tasks.get(f"reasoning-gym:{name}", train_size=1, validation_size=1, test_size=10)
    assert len(drawn(["isomorphic_strings"], "0", tmp_path)["isomorphic_strings"]) == 10


def test_tasks_without_a_seed_are_refused():
    for name in DRAWN_ANEW:
        with pytest.raises(ValueError, match=f"dataset: {name} of reasoning-gym has other problems at every draw"):
            tasks.get(f"reasoning-gym:{name}")


@pytest.mark.slow
def test_all_other_tasks_have_the_same_problems_in_every_process(tmp_path):
    from reasoning_gym.factory import DATASETS

    names = sorted(set(DATASETS) - DRAWN_BY_HASH - DRAWN_ANEW)
    one, other = drawn(names, "1", tmp_path), drawn(names, "2", tmp_path)
    assert [name for name in names if one[name] != other[name]] == []
    assert [name for name in names if len(one[name]) != 10] == ["composite"]  # it has no default config


def test_test_and_validation_stay_when_train_grows_and_change_with_the_seed():
    small, large, other = sums(train_size=10), sums(train_size=400), sums(seed=1)
    for split in ("test", "validation"):
        assert questions(small.problems(split)) == questions(large.problems(split))
        assert questions(small.problems(split)) != questions(other.problems(split))
    assert questions(small.problems("train")) == questions(large.problems("train"))[:10]


def test_small_spaces_say_how_many_there_are():
    task = sums(config={**SUMS, "max_digits": 1}, train_size=300)
    with pytest.raises(ValueError, match=r"train_size: 300 problems .*, but chain_sum .* gave \d\d that no other"):
        task.problems("train")


def test_prompts_solutions_and_rewards():
    task = sums()
    problems = task.problems("validation")[:3]
    assert problems[0].messages[0] == {"role": "system", "content": "Answer with the final answer only."}
    assert sums(system_prompt=None).problems("test")[0].messages[0]["role"] == "user"
    assert task.rewards(problems, [problem.solution for problem in problems]) == [1, 1, 1]
    assert task.rewards(problems, ["", "many", "1000000"]) == [-1, -1, -1]


@pytest.mark.parametrize(
    ("answer", "reference", "found"),
    [
        ("42", "42", "42"),
        ("2 + 40 = 42.", "42", "42"),
        ("The answer is 1,042", "1042", "1042"),
        ("1 2 3", "42", "3"),
        ("-7 apples", "-7", "-7"),
        ("no idea", "42", "no idea"),
        ("Yes, because", "Yes", "Yes"),
        ("The answer is **No**.", "Yes", "No"),
        ("Answer: yes", "Yes", "yes"),
        ("Yes No", "No", "Yes"),
        ('The final answer is: "a b c".', "a b c", "a b c"),
        ("", "Yes", ""),
    ],
)
def test_lenient_extraction_reads_one_answer(answer, reference, found):
    assert lenient(answer, reference) == found


def test_strict_extraction_and_partial_credit():
    (problem,) = sums(test_size=1).problems("test")
    answer = f"The sum is {problem.solution}."
    assert sums().scores([problem], [answer]) == [1]
    assert sums(extraction="strict").scores([problem], [answer]) == [0]
    (partial,) = sums(extraction="strict", partial_credit=True).scores([problem], [answer])
    assert 0 < partial < 1


@pytest.mark.parametrize(
    "name", ["letter_counting", "syllogism", "products", "gcd", "prime_factorization", "basic_arithmetic"]
)
def test_other_tasks_accept_their_own_solutions(name):
    task = tasks.get(f"reasoning-gym:{name}", train_size=20, validation_size=2, test_size=2)
    problems = task.problems("train")
    assert task.scores(problems, [problem.solution for problem in problems]) == [1.0] * 20
    assert sum(task.scores(problems, ["zebra"] * 20)) == 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"config": {"terms": 2}}, "config: chain_sum of reasoning-gym rejects {'terms': 2}"),
        ({"config": {"min_terms": 5, "max_terms": 2}}, "config: chain_sum"),
        ({"config": {"seed": 2}}, "config: seed are options of the task"),
        ({"train_size": 0}, "train_size: expected an integer >= 1, got 0"),
        ({"extraction": "loose"}, "extraction: expected 'lenient' or 'strict', got 'loose'"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(ValueError, match=match):
        sums(**options)


def test_unknown_tasks_name_the_nearest():
    with pytest.raises(ValueError, match=r"reasoning-gym has no task 'chain_sums'; nearest: chain_sum"):
        tasks.get("reasoning-gym:chain_sums")
