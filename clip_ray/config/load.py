"""Filling the configuration from a YAML recipe and `--section.key value` flags.

Flags win over the recipe, the recipe over the defaults. What is wrong is named with its path,
its value, what was expected, and the nearest name that exists.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict, SettingsError

from clip_ray.config.schema import Config
from clip_ray.errors import ConfigError

Root = TypeVar("Root", bound=BaseModel)


@overload
def load_config(
    argv: Sequence[str],
    *,
    default_recipe: Path | None,
    program: str,
    defaults: dict[str, Any] | None = None,
) -> Config: ...


@overload
def load_config(
    argv: Sequence[str],
    *,
    default_recipe: Path | None,
    program: str,
    defaults: dict[str, Any] | None = None,
    schema: type[Root],
) -> Root: ...


def load_config(
    argv: Sequence[str],
    *,
    default_recipe: Path | None,
    program: str,
    defaults: dict[str, Any] | None = None,
    schema: type[BaseModel] = Config,
) -> BaseModel:
    """Return the configuration that a command line describes.

    Args:
        argv: the arguments after the program's name; `--config FILE` names a recipe, everything
            else is `--section.key value` or `--section.key=value`. `--help` prints all fields
            and exits.
        default_recipe: used where no `--config` is given.
        program: shown by `--help`.
        defaults: settings below the recipe's, for jobs that need fewer than training does.
        schema: the root of the tree; its fields are the sections.

    Raises:
        ConfigError: a file, key or value that cannot be used.
    """
    recipe, flags = _split_recipe(list(argv), default_recipe)
    if any(flag in ("-h", "--help") for flag in flags):
        _print_help(program, schema)
        raise SystemExit(0)
    given = _read_recipe(recipe, default_recipe) if recipe is not None else {}
    known = set(field_paths(schema))
    merged = _merge(_merge(defaults or {}, given), _parse_flags(flags, known))
    try:
        return schema.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_explain(error, known)) from error


def dump_config(config: BaseModel) -> str:
    """Return the resolved tree as YAML; `load_config` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested dict as one level: {"a": {"b": [1]}} -> {"a.b.0": 1}."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        path = f"{prefix}{name}"
        if isinstance(value, list | tuple):
            value = {str(i): v for i, v in enumerate(value)} or "[]"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{path}.") if value else {path: "{}"}
        else:
            flat[path] = value
    return flat


def _split_recipe(argv: list[str], default: Path | None) -> tuple[Path | None, list[str]]:
    flags: list[str] = []
    recipe = default
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--config":
            value = next(arguments, None)
            if value is None:
                raise ConfigError("--config needs the path of a YAML recipe")
            recipe = Path(value)
        elif argument.startswith("--config="):
            recipe = Path(argument.removeprefix("--config="))
        else:
            flags.append(argument)
    return recipe, flags


def _read_recipe(path: Path, usual: Path | None) -> dict[str, Any]:
    try:
        text = path.read_text()
    except OSError as error:
        where = f"{usual.parent.parent.name}/{usual.parent.name}" if usual else "jobs/configs"
        raise ConfigError(
            f"--config {path}: cannot read it ({error.strerror}); recipes lie in {where}/"
        ) from error
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"--config {path}: expected sections at the top, found {type(tree)}")
    return tree


def _parse_flags(flags: list[str], known: set[str]) -> dict[str, Any]:
    """Turn `--a.b value` into a tree; each value is read as YAML, so lists and null work too."""
    tree: dict[str, Any] = {}
    arguments = iter(flags)
    for argument in arguments:
        if not argument.startswith("--"):
            raise ConfigError(
                f"unexpected argument {argument!r}; settings are given as --section.key value"
            )
        name, equals, value = argument.removeprefix("--").partition("=")
        if name not in known:
            raise ConfigError(_unknown(name, known))
        if not equals:
            following = next(arguments, None)
            if following is None or following.startswith("--"):
                raise ConfigError(f"--{name} needs a value")
            value = following
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            parsed = value
        section = tree
        *path, last = name.split(".")
        for part in path:
            section = section.setdefault(part, {})
        if name == "data.sources" and isinstance(parsed, str):
            parsed = [{"path": path} for path in parsed.split(",")]
        # YAML reads on, off, yes and no as booleans: a run may be called "on".
        is_word = isinstance(parsed, bool) and value.lower() not in ("true", "false")
        section[last] = value if is_word else parsed
    return tree


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = (
            _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    if "train" in over and isinstance(merged.get("train"), dict):
        # A length on the command line replaces the recipe's, whatever its unit; so below that.
        lengths = {"steps", "samples", "passes"}
        if isinstance(over["train"], dict) and (given := lengths & over["train"].keys()):
            for other in lengths - given:
                merged["train"].pop(other, None)
    return merged


def field_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted path of each field below a section, sections themselves excluded."""
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from field_paths(annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _unknown(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    last = name.rsplit(".", 1)[-1]
    same = [k for k in sorted(known) if k.rsplit(".", 1)[-1] == last]
    hint = near[0] if near else (same[0] if same else None)
    return f"{name}: no such setting" + (
        f"; did you mean {hint}?" if hint else "; --help lists all of them"
    )


def _explain(error: ValidationError, known: set[str]) -> str:
    """Say what is wrong with each value, one line a problem."""
    lines = []
    for detail in error.errors(include_url=False):
        path = ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "extra_forbidden":
            lines.append(_unknown(path, known))
        elif detail["type"] == "missing":
            lines.append(f"{path or 'config'}: required and not given{_length_hint(path)}")
        else:
            lines.append(f"{path or 'config'}: {_expectation(detail)}")
    return "\n".join(lines)


def _length_hint(path: str) -> str:
    if path == "train":
        return "; give its length, e.g. --train.steps 1000"
    return ""


def _expectation(detail: ErrorDetails) -> str:
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return message
    return f"{detail['input']!r}: {message[0].lower()}{message[1:]}"


def _print_help(program: str, schema: type[BaseModel]) -> None:
    class Settings(schema, BaseSettings):  # type: ignore[valid-type, misc]
        model_config = SettingsConfigDict(
            cli_prog_name=program, cli_avoid_json=True, cli_hide_none_type=True
        )

    try:
        CliApp.run(Settings, cli_args=["--help"])
    except SettingsError as error:  # pragma: no cover - a defect of ours, shown plainly
        print(error, file=sys.stderr)
