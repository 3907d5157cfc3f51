"""Validated option sets: unknown keys are errors, and every error says what is allowed."""

import json
from collections.abc import Mapping
from typing import Self, get_args

import annotated_types
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from engine.errors import OptionError

_TYPE_NAMES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of at most 64 bits",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "string_type": "a text",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "none_required": "null",
    "is_instance_of": "an array",
}


class Options(BaseModel):
    """Base of every option set: frozen, strictly typed, finite numbers only."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )

    @classmethod
    def parse(cls, values: Mapping[str, object], source: str = "") -> Self:
        """Validate plain values, as read from TOML, JSON or a request.

        Raises OptionError that names the first wrong key, its value and what is allowed;
        `source` (a file's name, say) goes in front.
        """
        try:
            return cls.model_validate_json(json.dumps(dict(values)))
        except ValidationError as error:
            prefix = f"{source}: " if source else ""
            raise OptionError(prefix + describe(cls, error.errors()[0])) from None
        except TypeError as error:
            raise OptionError(f"{source or cls.__name__}: {error}") from None


def describe(model: type[BaseModel], error: ErrorDetails) -> str:
    """One pydantic error as our sentence: what, what is allowed, what was got."""
    path = [part for part in error["loc"] if isinstance(part, str | int)]
    name = ".".join(str(part) for part in path) or model.__name__
    owner = _owner(model, path)
    kind, value = error["type"], error["input"]
    if kind == "extra_forbidden":
        return f"unknown key '{name}'; allowed: {', '.join(owner.model_fields)}"
    if kind == "missing":
        return f"{name} is required"
    if kind in ("literal_error", "union_tag_invalid"):
        expected = error["ctx"].get("expected") or error["ctx"].get("expected_tags", "")
        allowed = str(expected).replace("'", "").replace(" or ", ", ")
        got = error["ctx"].get("tag", value)
        choice = f"one of {allowed}" if ", " in allowed else allowed
        return f"{name} must be {choice}, got {got!r}"
    if kind in _TYPE_NAMES:
        return f"{name} must be {_TYPE_NAMES[kind]}, got {value!r}"
    bounds = _bounds(owner, path)
    if bounds and kind in (
        "greater_than", "greater_than_equal", "less_than", "less_than_equal",
    ):  # fmt: skip
        return f"{name} must be {bounds}, got {value!r}"
    message = error["msg"].removeprefix("Value error, ")
    if isinstance(value, dict):  # a rule of several keys: the sentence names them
        return f"{name}: {message}" if path else message
    return f"{name}: {message}, got {value!r}"


def _owner(model: type[BaseModel], path: list[str | int]) -> type[BaseModel]:
    """The (nested) model in which the last part of a path stands."""
    for part in path[:-1]:
        field = model.model_fields.get(str(part))
        annotation = field.annotation if field else None
        for candidate in (annotation, *get_args(annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                model = candidate
    return model


def _bounds(model: type[BaseModel], path: list[str | int]) -> str:
    """The allowed range of a number, e.g. `1..1000`, from its field's metadata."""
    names = [part for part in path if isinstance(part, str)]
    if not names or names[-1] not in model.model_fields:
        return ""
    low = high = ""
    for rule in model.model_fields[names[-1]].metadata:
        match rule:
            case annotated_types.Ge(ge=bound):
                low = f"{bound}"
            case annotated_types.Gt(gt=bound):
                low = f"more than {bound}"
            case annotated_types.Le(le=bound):
                high = f"{bound}"
            case annotated_types.Lt(lt=bound):
                high = f"less than {bound}"
    if low and high:
        if low[0].isdigit() and high[0].isdigit():
            return f"{low}..{high}"
        low = low if low.startswith("more") else f"at least {low}"
        return f"{low} and {high if high.startswith('less') else f'at most {high}'}"
    if low:
        return low if low.startswith("more") else f"at least {low}"
    return high if high.startswith("less") else f"at most {high}" if high else ""
