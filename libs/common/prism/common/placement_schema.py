"""The JSON schema of placement files, and what it says of a file, in words.

`python -m prism.common.placement_schema` prints the schema; docs/placement.schema.json is that.
"""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import msgspec
from jsonschema import Draft202012Validator
from jsonschema.validators import extend

from prism.common.messages.models import ModelSpec

Schema = dict[str, Any]
LONGEST_VALUE = 80


@dataclass(frozen=True, order=True)
class Problem:
    """Something wrong with a file: where (`[2].init_placements[0].gpu_ids[1]`), and what is allowed."""

    path: str
    complaint: str

    def __str__(self) -> str:
        return f"{self.path}: {self.complaint}"


def placement_schema() -> Schema:
    """The schema, made of the wire types: their ranges and descriptions are its own."""
    schema = msgspec.json.schema(list[ModelSpec])
    return {
        "$schema": Draft202012Validator.META_SCHEMA["$id"],
        "title": "Prism placement file",
        "description": "The models that Prism serves, in the order in which they are started.",
        **schema,
    }


def schema_problems(document: object) -> Iterator[Problem]:
    """All that the schema finds wrong with `document`, each with the value found and what is allowed."""
    for error in _validator.iter_errors(document):
        where = list(error.absolute_path)
        schema = cast(Schema, error.schema)
        if error.validator == "additionalProperties":
            yield from _unknown_fields(where, error.instance, schema)
        elif error.validator == "required":
            yield from _missing_fields(where, error.instance, schema)
        else:
            found, allowed = shown(error.instance), allowed_values(schema)
            yield Problem(path_of(where), f"{found} is not allowed here; allowed: {allowed}")


def path_of(where: Sequence[str | int]) -> str:
    """A place in a document as people write it."""
    parts = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in where]
    return "".join(parts).removeprefix(".") or "the file"


def shown(value: object) -> str:
    """`value` as JSON, cut where it gets long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def _unknown_fields(
    where: Sequence[str | int], found: Mapping[str, object], schema: Schema
) -> Iterator[Problem]:
    known = list(schema["properties"])
    for name in sorted(set(found) - set(known)):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(known)}"
        value = shown(found[name])
        yield Problem(path_of([*where, name]), f"unknown field with value {value}; {hint}")


def _missing_fields(
    where: Sequence[str | int], found: Mapping[str, object], schema: Schema
) -> Iterator[Problem]:
    for name in schema["required"]:
        if name not in found:
            allowed = allowed_values(schema["properties"][name])
            yield Problem(path_of([*where, name]), f"missing; allowed: {allowed}")


def allowed_values(schema: Schema) -> str:
    """What `schema` lets through, in words."""
    if "$ref" in schema:
        return allowed_values(_schema["$defs"][schema["$ref"].rpartition("/")[2]])
    if "anyOf" in schema:
        return " or ".join(allowed_values(one) for one in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(shown(value) for value in schema["enum"])
    match schema["type"]:
        case "integer":
            return f"a whole number{_range(schema)}"
        case "number":
            return f"a number{_range(schema)}"
        case "string":
            longest = f" of at most {schema['maxLength']} characters" if "maxLength" in schema else ""
            return f"text{longest}, not empty" if schema.get("minLength") else f"text{longest}"
        case "boolean":
            return "true or false"
        case "array":
            least = " of at least one" if schema.get("minItems") else ""
            different = ", no two the same" if schema.get("uniqueItems") else ""
            return f"a list{least}{different}, each: {allowed_values(schema['items'])}"
        case "object":
            return f"an object with the fields {', '.join(schema['properties'])}"
        case kind:
            return str(kind)


def _range(schema: Schema) -> str:
    if "exclusiveMinimum" in schema:
        return f" above {schema['exclusiveMinimum']} and at most {schema['maximum']}"
    return f" from {schema['minimum']} to {schema['maximum']}"


# As the wire types have it: 1.0 is no whole number.
_Validator = extend(  # type: ignore[no-untyped-call]
    Draft202012Validator,
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine(
        "integer", lambda _, value: isinstance(value, int) and not isinstance(value, bool)
    ),
)
_schema = placement_schema()
_validator = _Validator(_schema)


if __name__ == "__main__":
    print(json.dumps(_schema, indent=2))
