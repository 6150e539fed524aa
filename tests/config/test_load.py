"""From recipe and flags to one tree; what cannot be used is named with a way out."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from clip_ray.config import Config, SourceConfig
from clip_ray.config.load import dump_config, field_paths, flatten, load_config
from clip_ray.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]


def load(*argv: str, recipe: Path | None = None) -> Config:
    return load_config(list(argv), default_recipe=recipe, program="test")


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("separator", ["=", " "])
def test_flags_are_typed(separator: str) -> None:
    pairs = {
        "train.steps": "7",
        "optim.lr": "1e-3",
        "model.quick_gelu": "true",
        "optim.clip_norm": "null",
        "train.profile_steps": "[2,3]",
        "run.name": "on",
    }
    argv = [part for k, v in pairs.items() for part in f"--{k}{separator}{v}".split(" ", 1)]
    config = load(*argv)
    assert config.train.steps == 7 and config.train.profile_steps == (2, 3)
    assert config.optim.lr == 1e-3 and config.optim.clip_norm is None
    assert config.model.quick_gelu is True
    assert config.run.name == "on"  # a word, though YAML reads a boolean


@pytest.mark.parametrize(
    ("flag", "expected"),
    [("a.tar", ("a.tar",)), ("a.tar,b.tar", ("a.tar", "b.tar")), ("[{path: c}]", ("c",))],
)
def test_sources_on_the_command_line(flag: str, expected: tuple[str, ...]) -> None:
    config = load("--train.steps", "1", "--data.sources", flag)
    assert config.data.sources == tuple(SourceConfig(path=path) for path in expected)


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path: Path) -> None:
    recipe = write(tmp_path, "train: {steps: 5, global_batch: 64}\noptim: {lr: 0.1, warmup: 9}\n")
    config = load("--optim.lr", "0.2", recipe=recipe)
    assert (config.optim.lr, config.optim.warmup, config.optim.beta2) == (0.2, 9, 0.98)
    assert (config.train.steps, config.train.global_batch) == (5, 64)


@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
def test_a_named_recipe_replaces_the_default_one(tmp_path: Path, form: str) -> None:
    default = write(tmp_path, "train: {steps: 5}\noptim: {lr: 0.1}\n", "default.yaml")
    named = write(tmp_path, "train: {steps: 6}\n", "named.yaml")
    config = load(*form.format(named).split(" "), recipe=default)
    assert (config.train.steps, config.optim.lr) == (6, 5e-4)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--train.steps 3", (3, None, None)),
        ("--train.samples 3", (None, 3, None)),
        ("--train.passes 0.5", (None, None, 0.5)),
        ("--train.global_batch 8", (5, None, None)),
    ],
)
def test_a_length_on_the_command_line_replaces_the_recipes(
    tmp_path: Path, flags: str, expected: tuple[float | None, ...]
) -> None:
    train = load(*flags.split(), recipe=write(tmp_path, "train: {steps: 5}")).train
    assert (train.steps, train.samples, train.passes) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--train.steps 3 --train.passes 1", "train: give exactly one .* given: steps, passes"),
        ("", "train: required and not given; give its length, e.g. --train.steps 1000"),
        ("--train.global_batch 8", "train: give exactly one .*none is given"),
        ("--train.steps 1 --optim.learning_rate 1", "^optim.learning_rate: no such setting"),
        ("--train.step 1", "train.step: no such setting; did you mean train.steps"),
        ("--global_batch 1", "did you mean train.global_batch"),
        ("--xyzzy 1", "xyzzy: no such setting; --help lists all"),
        ("--train 1", "train: no such setting"),
        ("--train.steps", "--train.steps needs a value"),
        ("--train.steps --optim.lr 1", "--train.steps needs a value"),
        ("train.steps=1", "unexpected argument 'train.steps=1'; .* --section.key value"),
        ("--train.steps 0", "train.steps: 0: input should be greater than 0"),
        ("--train.steps many", "train.steps: 'many': input should be a valid integer"),
        ("--train.steps 1 --train.precision fp16", "train.precision: 'fp16': .*'fp32' or 'bf16'"),
        ("--train.steps 1 --model.name ViT-B-61", "model: no architecture is called 'ViT-B-61'"),
        ("--train.steps 1 --data.slot 6 --data.window 4", "config: data.window 4 does not divide"),
        ("--config", "--config needs the path"),
        ("--config /nowhere.yaml", "/nowhere.yaml: cannot read it .No such file"),
    ],
)
def test_what_cannot_be_used_is_explained(flags: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(*flags.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {steps: 1, globalbatch: 3}", "train.globalbatch: .* train.global_batch"),
        ("trian: {steps: 1}\ntrain: {steps: 1}", "trian: no such setting"),
        ("- train", "expected sections at the top"),
        ("train: {steps: [", "not valid YAML"),
        ("train: 3", "train: 3: "),
        ("train: {steps: 1}\ndata: {sources: [{path: a}, {pth: b}]}", "data.sources.1.path"),
    ],
)
def test_a_faulty_recipe_is_explained(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(recipe=write(tmp_path, text))


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load("--train.steps", "0", "--optim.lr", "-1", "--optim.eps", "0")
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["train.steps", "optim.lr", "optim.eps"]


def test_a_flag_below_a_section_that_is_no_mapping(tmp_path: Path) -> None:
    """The flag's section replaces it: there is nothing to merge with."""
    recipe = write(tmp_path, "train: {steps: 1}\noptim:\n")
    assert load("--optim.lr", "0.5", recipe=recipe).optim.lr == 0.5


def test_dumped_and_loaded_again_it_is_equal(tmp_path: Path) -> None:
    config = load(
        *("--train.passes", "1.5", "--train.profile_steps", "[1, 2]", "--run.name", "b-1"),
        *("--model.name", "ViT-L-14-336-quickgelu", "--model.text.layers", "3"),
        *("--data.sources", "[{path: 's3://b/{0..9}.tar', weight: 2.5}]", "--run.s3.profile", "p"),
        *("--optim.eps", "1e-9", "--run.storage", "s3://bücket/runs", "--eval.datasets", "[a, b]"),
    )
    text = dump_config(config)
    assert load(recipe=write(tmp_path, text)) == config
    assert "bücket" in text
    assert Config.model_validate(yaml.safe_load(text)) == config


def test_every_field_is_in_the_dump() -> None:
    config = load("--train.steps", "1")
    assert set(flatten(config.model_dump(mode="json"))) == set(field_paths(Config))


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {
        "a.b": 1,
        "a.c.d.0": 2,
        "e": None,
    }


def test_help_lists_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    missing = [path for path in field_paths(Config) if f"--{path}" not in text]
    assert missing == []


@pytest.mark.parametrize(
    "recipe", sorted((REPOSITORY / "jobs/configs").glob("*.yaml")), ids=lambda path: path.name
)
def test_the_recipes_load(recipe: Path) -> None:
    assert load(recipe=recipe).data.sources
