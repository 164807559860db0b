"""Fields of a JSON file that somebody else wrote: each is checked when it is read."""

from typing import Annotated, Any

from minivllm.errors import ConfigError
from minivllm.validation import Range, check, shown

#: A size in config.json. Kernels and tensors count in 32 bits; nothing real comes near.
Size = Annotated[int, Range(1, 2**31 - 1)]
Positive = Annotated[float, Range(0.0, above=True)]
Factor = Annotated[float, Range(0.0, 1e6, above=True)]


class ConfigFields:
    """The fields of one JSON object: ``read(name, annotation)`` gives a value of this type or
    raises `ConfigError`.
    """

    REQUIRED = object()

    def __init__(self, content: dict[str, Any], where: str) -> None:
        self.content, self.where = content, where

    def __call__(self, name: str, annotation: Any, default: Any = REQUIRED) -> Any:
        value = self.content.get(name)
        if value is None:
            if default is self.REQUIRED:
                raise ConfigError(f"{self.where} lacks the field {name!r}.")
            return default
        try:
            return check(value, annotation)
        except ValueError as error:
            raise ConfigError(f"{self.where}: {name} {error}.") from error

    def has(self, name: str) -> bool:
        """Whether the field is there, perhaps as null. Absent and null differ where a family's
        config class in transformers has a default that is not null.
        """
        return name in self.content

    def a(self, kind: type, name: str) -> Any:
        """A list or an object (kind: list, dict); an empty one when the field is absent."""
        value = self.content.get(name)
        if value is not None and not isinstance(value, kind):
            words = "a list" if kind is list else "an object"
            raise self.wrong(name, f"must be {words}, got {shown(value)}")
        return value or kind()

    def wrong(self, name: str, what: str) -> ConfigError:
        return ConfigError(f"{self.where}: {name} {what}.")
