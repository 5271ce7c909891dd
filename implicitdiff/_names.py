"""What reports and representations call the functions that users give."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

_WITHOUT_TEXT: Any = object.__repr__


def name_of(function: Any) -> str:
    """The name of a function; that of its class for any other callable."""
    if isinstance(function, functools.partial):
        return name_of(function.func)
    return getattr(function, "__name__", type(function).__name__)


def text_of(setting: Any) -> str:
    """How a setting is shown: functions, modules and objects with no representation of their own by their names."""
    if type(setting) is list:
        return f"[{', '.join(map(text_of, setting))}]"
    if type(setting) is dict:
        return f"{{{', '.join(f'{k!r}: {text_of(v)}' for k, v in setting.items())}}}"
    is_named = hasattr(setting, "__name__") or isinstance(setting, (functools.partial, nn.Module))
    if callable(setting) and (is_named or type(setting).__repr__ is _WITHOUT_TEXT):
        return name_of(setting)
    return repr(setting)


def call_of(name: str, settings: dict[str, Any]) -> str:
    """``name(key=value, …)``, without settings that are private, None or False."""
    given = {k: v for k, v in settings.items() if not (k.startswith("_") or v is None or v is False)}
    return f"{name}({', '.join(f'{k}={text_of(v)}' for k, v in given.items())})"
