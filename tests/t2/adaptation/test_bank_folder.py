from __future__ import annotations

import json

import pytest

import t2
from t2.adaptation import Domain, load_bank_folder, save_bank_folder
from t2.adaptation.bank_folder import named_experts

LAYOUT = t2.Layout(("a", "b"), (3, 4), "f" * 64, "tiny")
DOMAINS = {"sums": "adding numbers", "letters": ""}


@pytest.fixture
def experts():
    return {name: t2.Expert.random(LAYOUT, seed=seed) for seed, name in enumerate(DOMAINS)}


@pytest.fixture
def bank(tmp_path, experts):
    save_bank_folder(tmp_path / "bank", DOMAINS, experts, t2.Expert.random(LAYOUT, seed=9))
    return tmp_path / "bank"


def test_round_trip(bank, experts):
    assert sorted(path.name for path in bank.iterdir()) == [
        "classifier.safetensors",
        "domains.json",
        "letters.safetensors",
        "sums.safetensors",
    ]
    loaded = load_bank_folder(str(bank))
    assert loaded.domains == (Domain("sums", "adding numbers"), Domain("letters"))
    assert all((loaded.experts[name].z == experts[name].z).all() for name in DOMAINS)
    assert (loaded.classifier.z == t2.Expert.random(LAYOUT, seed=9).z).all()
    (bank / "classifier.safetensors").unlink()
    (bank / "README.md").write_text("a model card")
    assert load_bank_folder(bank).classifier is None


def test_experts_join_a_model(make_svf, tmp_path):
    svf = make_svf(())
    save_bank_folder(tmp_path / "bank", DOMAINS, {name: t2.Expert.random(svf.layout) for name in DOMAINS})
    load_bank_folder(tmp_path / "bank").add_to(svf)
    assert svf.bank.names == ["sums", "letters"]


@pytest.mark.parametrize(
    "content, text",
    [
        ("{", "does not describe a bank"),
        ("[]", "does not describe a bank"),
        ("[" * 100_000, "does not describe a bank: nested"),
        ('{"format": [NaN]}', r"does not describe a bank: .*finite"),
        ('{"format": "t2-bank-folder", "format_version": "1", "domains": {"\\ud800": ""}}', r"domains\.json"),
        ('{"format": "t2-bank-folder"}', "'format_version'"),
        ('{"format": "t2-bank-folder", "format_version": "2", "domains": {}}', "expected .'t2-bank-folder', '1'."),
        ('{"format": "t2-bank-folder", "format_version": "1", "domains": {}}', "expected at least one"),
        ('{"format": "t2-bank-folder", "format_version": "1", "domains": ["sums"]}', "descriptions by name"),
        (
            '{"format": "t2-bank-folder", "format_version": "1", "domains": {"sums": 3}}',
            "description: expected one line",
        ),
        (
            '{"format": "t2-bank-folder", "format_version": "1", "domains": {"../sums": ""}}',
            "names that are file names",
        ),
        (
            '{"format": "t2-bank-folder", "format_version": "1", "domains": {"classifier": ""}}',
            "other than 'classifier'",
        ),
    ],
)
def test_a_description_that_is_none(bank, content: str, text: str):
    (bank / "domains.json").write_text(content)
    with pytest.raises(t2.FileFormatError, match=text):
        load_bank_folder(bank)


def test_files_that_are_missing_or_others(bank, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"bank: expected a folder with domains\.json"):
        load_bank_folder(tmp_path / "absent")
    t2.Expert.random(t2.Layout(("a", "b"), (3, 4), "0" * 64)).save(bank / "letters.safetensors")
    with pytest.raises(t2.FileFormatError, match="expected experts of one base, letters: expected base weights"):
        load_bank_folder(bank)
    (bank / "letters.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"letters.safetensors"):
        load_bank_folder(bank)


def test_what_is_not_saved(tmp_path, experts, bank):
    with pytest.raises(ValueError, match="experts: expected one for each"):
        save_bank_folder(tmp_path / "x", {"sums": ""}, experts)
    with pytest.raises(FileExistsError, match="path: expected a new folder"):
        save_bank_folder(bank, DOMAINS, experts)
    with pytest.raises(ValueError, match="names that are file names"):
        save_bank_folder(tmp_path / "x", {"a/b": ""}, {"a/b": experts["sums"]})
    assert not (tmp_path / "x").exists()


def test_experts_by_name(tmp_path, experts):
    t2.Expert(experts["sums"].z, LAYOUT, {"description": "from the file"}).save(tmp_path / "s.safetensors")
    experts["letters"].save(tmp_path / "l.safetensors")
    pairs = [f"{name}={tmp_path / name[0]}.safetensors" for name in DOMAINS]
    bank = named_experts([*pairs, f"classifier={tmp_path / 'l.safetensors'}"])
    assert bank.domains == (Domain("sums", "from the file"), Domain("letters")) and bank.classifier is not None
    assert named_experts(pairs, {"sums": "mine"}).domains[0].description == "mine"
    for given, text in [
        ([pairs[0], pairs[0]], "candidates: expected NAME=FILE, each name once"),
        (["sums"], "candidates: expected NAME=FILE"),
        ([], "domains: expected at least one"),
    ]:
        with pytest.raises(ValueError, match=text):
            named_experts(given)
    with pytest.raises(ValueError, match="domains: expected names of experts"):
        named_experts(pairs, {"logic": ""})


@pytest.mark.parametrize(
    "about",
    [
        {"domains": '["sums", "dates"]'},
        {"task": "classify", "options": json.dumps({"task_options": json.dumps({"domains": {"sums": "", "x": ""}})})},
    ],
)
def test_domains_that_the_classifier_does_not_know_are_named(bank, experts, about):
    t2.Expert(experts["sums"].z, LAYOUT, about).save(bank / "classifier.safetensors")
    pairs = [f"{name}={bank / name}.safetensors" for name in (*DOMAINS, "classifier")]
    for load in (lambda: load_bank_folder(bank), lambda: named_experts(pairs)):
        with pytest.warns(UserWarning, match=r"classifier\.safetensors was trained on .*sums.*, not on letters"):
            assert load().classifier is not None


def test_a_classifier_that_knows_its_bank_loads_in_silence(bank, experts, recwarn):
    for about in ({}, {"domains": '["letters", "sums"]'}, {"domains": '["letters", "more", "sums"]'}):
        t2.Expert(experts["sums"].z, LAYOUT, about).save(bank / "classifier.safetensors")
        load_bank_folder(bank)
    load_bank_folder("smollm2-135m-instruct")
    assert not recwarn.list


@pytest.mark.parametrize("text", ["[", "5", "[5]", '{"sums": ""}', "[" * 100_000])
def test_domains_that_are_no_list_of_names(bank, experts, text):
    for about in ({"domains": text}, {"task": "classify", "options": text}):
        t2.Expert(experts["sums"].z, LAYOUT, about).save(bank / "classifier.safetensors")
        with pytest.raises(t2.FileFormatError, match=r"classifier\.safetensors: (domains|options): "):
            load_bank_folder(bank)
