"""Things a user names as "package.module:factory", and options a callable can take."""

from __future__ import annotations

import importlib
import inspect
import traceback
from collections.abc import Callable
from typing import Any

from wgates_plugin.errors import ConfigError, first_line


def is_factory_name(name: str) -> bool:
    """True for "package.module:attribute", false for "folder:/some/path" and plain names."""
    module, colon, attribute = name.partition(":")
    return bool(colon) and all(
        part.isidentifier() for part in (module + "." + attribute).split(".")
    )


def load_factory(name: str) -> Callable[..., Any]:
    """The callable named "package.module:attribute"; importing it runs that module's code.

    Raises:
        ConfigError: the module cannot be imported or has no such callable.
    """
    module_name, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"factory `{name}`",
            [
                f"module `{error.name}` cannot be found; install it, put its folder on PYTHONPATH, "
                "or run `wgates` from the folder it is in"
            ],
        ) from error
    except (ImportError, SyntaxError) as error:
        raise ConfigError(
            f"factory `{name}`",
            [
                f"module `{module_name}` cannot be imported ({_place(error)}: {first_line(error)}); mend "
                "it, or what it imports"
            ],
        ) from error
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ConfigError(
            f"factory `{name}`", [f"`{module_name}` has no callable `{attribute}`; check the name"]
        )
    return found


def _place(error: ImportError | SyntaxError) -> str:
    """File and line where an import failed."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.filename}, line {last.lineno}"


def accepted(function: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """Those of `offered` that `function` takes by keyword (all of them with **kwargs).

    >>> accepted(lambda classes, *, width=8: None, {"classes": 10, "in_channels": 3})
    {'classes': 10}
    """
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(offered)
    named = {
        parameter.name
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    return {key: value for key, value in offered.items() if key in named}
