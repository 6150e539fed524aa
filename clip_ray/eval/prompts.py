"""Prompt templates: how a class name becomes sentences.

The 80 templates that OpenAI published for ImageNet are theirs and are not copied here; a data set
in CLIP_benchmark's layout brings its own in zeroshot_classification_templates.txt.
"""

from __future__ import annotations

from collections.abc import Sequence

from clip_ray.errors import ConfigError

DEFAULT_TEMPLATES = (
    "a photo of a {c}.",  # Radford et al. 2021, section 3.1.4
    "a picture of a {c}.",
    "an image showing a {c}.",
    "a close view of a {c}.",
    "a {c} seen from some distance.",
    "a {c}.",
)


def fill(template: str, name: str) -> str:
    """Return a template with `{c}` or `{}` replaced by a class name.

    Raises:
        ConfigError: the template has no such place.
    """
    for place in ("{c}", "{}"):
        if place in template:
            # Not str.format: other braces in a template or a name mean nothing.
            return template.replace(place, name)
    raise ConfigError(f"prompt template {template!r}: expected {{c}} or {{}} for the class name")


def filled_length(template: str, name_length: int) -> int:
    """Return the characters of `fill(template, name)` for a name of so many, without making it.

    A template may name the class many times, so a few kB of templates can stand for GB of text.
    """
    for place in ("{c}", "{}"):
        if place in template:
            return len(template) + template.count(place) * (name_length - len(place))
    return len(template)


def prompts(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Return all sentences: N classes times T templates, the templates of a class together.

    Raises:
        ConfigError: there is no template, or one without a place for the name.
    """
    if not templates:
        raise ConfigError("no prompt templates; give at least one, such as 'a photo of a {c}.'")
    return [fill(template, name) for name in names for template in templates]
