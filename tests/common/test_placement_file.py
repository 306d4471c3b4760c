"""Placement files: all that is wrong with one is told at once; schema and docs say what the code does."""

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from prism.common.errors import ErrorCode, PrismError
from prism.common.garbage import garbage_collected_later
from prism.common.placement_file import read_placement_file
from prism.common.placement_schema import allowed_values, placement_schema

pytestmark = pytest.mark.core

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLES = Path(__file__).parents[2] / "examples"
GOOD = {"model_name": "good", "model_path": "/good"}


def refusal(tmp_path: Path, text: str) -> list[str]:
    """The lines of the message that refuses a file of this `text`."""
    path = tmp_path / "placement.json"
    path.write_text(text)
    with pytest.raises(PrismError) as refused:
        read_placement_file(path)
    assert refused.value.code is ErrorCode.INVALID_REQUEST
    return [line.strip() for line in refused.value.message.splitlines()]


def test_every_error_of_a_file_is_told_at_once(tmp_path: Path) -> None:
    models = [
        {"model_name": "a", "modl_path": "/a", "tp_size": "two"},
        GOOD,
        {"model_name": "good", "model_path": "/b", "init_placements": [{"gpu_ids": [0, -1], "on": 1}]},
        "c",
    ]
    assert refusal(tmp_path, json.dumps(models)) == [
        f"placement file {tmp_path}/placement.json has 8 errors (see docs/placement-file.md):",
        "[0].model_path: missing; allowed: text, not empty",
        '[0].modl_path: unknown field with value "/a"; did you mean model_path?',
        '[0].tp_size: "two" is not allowed here; allowed: a whole number from 1 to 1024',
        "[2].init_placements[0].gpu_ids: [0, -1] names 2 GPU(s); allowed: as many as tp_size, which is 1",
        "[2].init_placements[0].gpu_ids[1]: -1 is not allowed here; "
        "allowed: a whole number from 0 to 1000000",
        "[2].init_placements[0].on: 1 is not allowed here; allowed: true or false",
        '[2].model_name: "good" is the name of [1] already; names must differ',
        '[3]: "c" is not allowed here; allowed: an object with the fields model_name, model_path, '
        "tokenizer_path, tp_size, init_placements, ttft_slo_ms, tpot_slo_ms, priority, pin, replicas, "
        "minimum_tier, idle_timeout_s",
    ]


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"model_name": ""}, '[0].model_name: "" is not allowed here; allowed: text of at most 256'),
        ({"model_path": 7}, "[0].model_path: 7 is not allowed here; allowed: text, not empty"),
        ({"tp_size": 0}, "[0].tp_size: 0 is not allowed"),
        ({"tp_size": 1.0}, "[0].tp_size: 1.0 is not allowed here; allowed: a whole number"),
        ({"tp_size": True}, "[0].tp_size: true is not allowed here; allowed: a whole number"),
        ({"ttft_slo_ms": 0}, "[0].ttft_slo_ms: 0 is not allowed here; allowed: a number from 0.001 to"),
        (
            {"tpot_slo_ms": 1e-323},
            "[0].tpot_slo_ms: 1e-323 is not allowed here; allowed: a number from 0.001",
        ),
        ({"replicas": 0}, "[0].replicas: 0 is not allowed"),
        (
            {"minimum_tier": "awake"},
            '[0].minimum_tier: "awake" is not allowed here; allowed: one of ',
        ),
        ({"colour": "red"}, '[0].colour: unknown field with value "red"; allowed: model_name, model_path'),
        ({"pin": True, "idle_timeout_s": 5}, "[0].idle_timeout_s: 5 can have no effect where pin is true"),
        (
            {"minimum_tier": "active", "idle_timeout_s": 5},
            "[0].idle_timeout_s: 5 can have no effect where minimum_tier is active",
        ),
        ({"init_placements": [{"gpu_ids": []}]}, "[0].init_placements[0].gpu_ids: [] is not allowed"),
        (
            {"tp_size": 2, "init_placements": [{"gpu_ids": [3, 3]}]},
            "[0].init_placements[0].gpu_ids: [3, 3] is not allowed here; "
            "allowed: a list of at least one, no two the same",
        ),
        (
            {"init_placements": [{"gpu_ids": [1]}, {"gpu_ids": [1]}]},
            "[0].init_placements[1].gpu_ids: GPU 1 is in [0].init_placements[0].gpu_ids too",
        ),
        (
            {"init_placements": [{"gpu_ids": [1], "max_memory_pool_size": 0}]},
            "[0].init_placements[0].max_memory_pool_size: 0 is not allowed here; allowed: a number above 0",
        ),
        ({"init_placements": [{}]}, "[0].init_placements[0].gpu_ids: missing"),
    ],
)
def test_a_mistake_is_named_with_its_place_its_value_and_what_is_allowed(
    tmp_path: Path, fields: dict[str, object], complaint: str
) -> None:
    head, *problems = refusal(tmp_path, json.dumps([{**GOOD, **fields}]))
    assert "has 1 error " in head
    assert problems[0].startswith(complaint)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            '[{"model_name": "a",}]',
            "is not valid JSON: Expecting property name enclosed in double quotes",
        ),
        ('[{"model_name": NaN}]', "is not valid JSON: NaN is no JSON number"),
        ('[{"model_name": "\\ud800"}]', "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("", "is not valid JSON: Expecting value: line 1 column 1"),
        ("{}", "the file: {} is not allowed here; allowed: a list"),
    ],
)
def test_what_is_no_list_of_models_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    # Where brackets have used up the stack, hypothesis's callback would fail, which pytest takes amiss.
    with garbage_collected_later():
        assert complaint in " ".join(refusal(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PrismError, match=r"nowhere\.json: No such file"):
        read_placement_file(tmp_path / "nowhere.json")


def test_the_published_schema_is_the_one_that_is_checked_by() -> None:
    published = json.loads((DOCS / "placement.schema.json").read_text())
    assert published == placement_schema(), (
        "python -m prism.common.placement_schema > docs/placement.schema.json"
    )
    Draft202012Validator.check_schema(published)
    for example in EXAMPLES.glob("*.json"):
        Draft202012Validator(published).validate(json.loads(example.read_text()))


def test_the_docs_describe_every_field_as_the_schema_does() -> None:
    text = (DOCS / "placement-file.md").read_text()
    kinds = placement_schema()["$defs"]
    for kind in (kinds["ModelSpec"], kinds["InitialPlacement"]):
        for name, field in kind["properties"].items():
            default = "required" if name in kind["required"] else f"`{json.dumps(field['default'])}`"
            row = f"| `{name}` | {allowed_values(field)} | {default} | {field['description']} |"
            assert row in text
