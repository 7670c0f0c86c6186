"""Documents of six kinds: schemas, answers that can be read, other names of keys."""

from __future__ import annotations

import json

import pytest
from conftest import read_lines

from data import make_kinds
from distil.idp.validation import checked_validator, subschemas
from distil.idp.values import choices_of, leaves, occurs_in


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    argv = ["--documents", "20", "--validation", "30", "--outdir", str(folder)]
    assert make_kinds.main([*argv, "--train", "cv", "minutes"]) == 0
    return folder


@pytest.mark.parametrize("name", ["train", "validation"])
def test_answers_validate_and_every_value_can_be_read_in_its_document(folder, name):
    rows = read_lines(folder / f"{name}.jsonl")
    assert len({row["document"] for row in rows}) == len(rows) == (40 if name == "train" else 180)
    for row in rows:
        assert checked_validator(row["schema"], "s").is_valid(row["expected"])
        chosen = {*choices_of(row["schema"])}
        for path, value in leaves(row["expected"]):
            if value is not None and not isinstance(value, bool) and path not in chosen:
                assert occurs_in(path, value, row["document"]), (path, value, row["document"])


def test_validation_has_the_schema_of_its_kind_and_training_many(folder):
    validation, train = (read_lines(folder / f"{name}.jsonl") for name in ("validation", "train"))
    for kind in make_kinds.KINDS:
        schema = json.loads((folder / f"{kind}_schema.json").read_text())
        text = json.dumps(schema)
        assert all(text == json.dumps(row["schema"]) for row in validation if row["kind"] == kind)
        assert all(word in text for word in ('"$defs"', '"enum"', '"null"', '"array"', '"description"')), kind
    assert {row["kind"] for row in train} == {"cv", "minutes"}
    assert len({json.dumps(row["schema"]) for row in train}) > 30
    assert all(list(row["schema"]["properties"]) == list(row["expected"]) for row in train)


def test_no_object_can_have_one_name_for_two_keys():
    for schema, _, _ in make_kinds.KINDS.values():
        for _, part in subschemas(schema):
            keys = part.get("properties", {})
            others = [name for key in keys for name in make_kinds.OTHER_NAMES.get(key, "").split("|") if name]
            assert len({*keys, *others}) == len(keys) + len(others), (keys, others)


def test_the_same_seed_gives_the_same_bytes(folder, tmp_path):
    argv = ["--documents", "20", "--validation", "30", "--outdir", str(tmp_path)]
    assert make_kinds.main([*argv, "--train", "cv", "minutes"]) == 0
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()
