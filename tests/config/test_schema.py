"""The rules that tie fields together, and what may not be in a config."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from clip_ray.config import Config
from clip_ray.config.load import load_config
from clip_ray.errors import ConfigError


def config(**sections: Any) -> Config:
    return Config.model_validate({"train": {"steps": 1}} | sections)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {}}, "none is given"),
        ({"train": {"steps": 1, "passes": 2}}, "given: steps, passes"),
        (
            {"train": {"steps": 1, "samples": 2, "passes": 3}},
            "given: steps, samples, passes",
        ),
        ({"train": {"steps": 1, "profile_steps": [5, 4]}}, "expected 0 < first <= last"),
        ({"train": {"steps": 1, "profile_steps": [0, 4]}}, "expected 0 < first <= last"),
        ({"data": {"slot": 6, "window": 4}}, "data.window 4 does not divide data.slot 6"),
        (
            {"data": {"sources": [{"path": "a", "weight": 1}, {"path": "b"}]}},
            "without one: b",
        ),
        (
            {"data": {"sources": [{"path": "a", "where": ["similarity 0.3"]}]}},
            "'similarity 0.3' is no condition; expected COLUMN, <= >= == != < >, VALUE",
        ),
        (
            {"data": {"sources": [{"path": "a", "where": ["a > 1", "b == null"]}]}},
            "'b == null': cannot compare with null",
        ),
        (
            {"data": {"sources": [{"path": "a", "where": ["n != a and s > 1"]}]}},
            "each condition is an entry of its own",
        ),
        ({"data": {"sources": [{"path": "a", "where": ["n <> a"]}]}}, "cannot compare with > a"),
        ({"data": {"sources": [{"path": "a", "where": ["n === a"]}]}}, "cannot compare with = a"),
        ({"data": {"sources": [{"path": "a", "where": ["n != NaN"]}]}}, "compare with NaN"),
        ({"data": {"sources": [{"path": "a", "where": ["n == 'a'"]}]}}, "in double quotes"),
        ({"tokenizer": {"vocab": "x.json", "train_vocab": 600}}, "not both"),
        ({"tokenizer": {"train_vocab": 513}}, "greater than or equal to 514"),
        (
            {"model": {"vision": {"image_size": 224, "patch_size": 30}}},
            "patch_size 30 does not divide image_size 224",
        ),
        ({"model": {"vision": {"heads": 5}}}, "heads 5 does not divide width 768"),
        ({"model": {"text": {"heads": 3}}}, "heads 3 does not divide width 512"),
        ({"cluster": {"price_per_hour": 0}}, "greater than 0"),
        ({"cluster": {"price_per_hour": -1.5}}, "greater than 0"),
        ({"run": {"name": "../up"}}, "should match pattern"),
        ({"run": {"name": ".hidden"}}, "should match pattern"),
        ({"train": {"steps": 1, "global_batch": 0}}, "greater than 0"),
        ({"data": {"holdout": 1.0}}, "less than 1"),
        ({"optim": {"beta1": 1.0}}, "less than 1"),
        ({"train": {"steps": 1, "precision": "fp16"}}, "'fp32' or 'bf16'"),
    ],
)
def test_rules(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**sections)


@pytest.mark.parametrize("length", [{"steps": 3}, {"samples": 3}, {"passes": 0.5}])
def test_one_length_is_enough(length: dict[str, Any]) -> None:
    assert config(train=length).train.model_dump(include=set(length)) == length


@pytest.mark.parametrize(
    "uri",
    [
        "https://me:secret@mlflow.example/path",
        "https://token@mlflow.example",
        "postgresql://me:secret@db:5432/mlflow",
        "me:secret@mlflow.example",
    ],
)
def test_credentials_in_the_tracking_uri_are_refused(uri: str) -> None:
    with pytest.raises(ValidationError, match="MLFLOW_TRACKING_USERNAME"):
        config(tracking={"uri": uri})


@pytest.mark.parametrize(
    "uri",
    [
        None,
        "https://mlflow.example:5000/team@work",
        "sqlite:////home/me@work/mlflow.db",
        "databricks://profile",
    ],
)
def test_other_tracking_uris_are_taken(uri: str | None) -> None:
    assert config(tracking={"uri": uri}).tracking.uri == uri


@pytest.mark.parametrize("section", sorted(Config.model_fields))
def test_every_section_is_frozen_and_closed(section: str) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        setattr(config(), section, None)
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        config(**{section: {"steps": 1, "nonsense": 1} if section == "train" else {"nonsense": 1}})


def test_stable_sections() -> None:
    """Others script against these names: DESIGN.md section 11."""
    assert {
        "run",
        "cluster",
        "data",
        "tokenizer",
        "model",
        "train",
        "optim",
        "checkpoint",
        "eval",
        "tracking",
    } <= Config.model_fields.keys()


def test_every_field_says_what_it_is() -> None:
    def undescribed(model: Any, prefix: str = "") -> list[str]:
        found = []
        for name, field in model.model_fields.items():
            if not field.description:
                found.append(prefix + name)
            if hasattr(field.annotation, "model_fields"):
                found += undescribed(field.annotation, f"{prefix}{name}.")
        return found

    assert undescribed(Config) == []


def flags(workers: str) -> Config:
    argv = ["--train.steps", "1", "--cluster.num_workers", workers]
    return load_config(argv, default_recipe=None, program="test")


@pytest.mark.parametrize(("value", "counts"), [("3", [3]), ("[2, 4]", [2, 3, 4]), ("[2, 2]", [2])])
def test_a_number_of_workers_may_be_a_range(value: str, counts: list[int]) -> None:
    config = flags(value)
    assert list(config.cluster.worker_counts) == counts


@pytest.mark.parametrize("value", ["0", "[3, 2]", "[0, 2]", "9000", "2,4", "[1, 2, 3]"])
def test_what_is_no_number_of_workers_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="cluster"):
        flags(value)
