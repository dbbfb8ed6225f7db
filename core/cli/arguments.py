"""Types of command-line arguments, and flags that are made from the fields of a configuration."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from ..bank.tokens import typed_name
from ..demo.bases import EMBEDDED, NAMES
from ..settings import Limit, read_bool, read_setting, settings_of

KIND_HELP = "object: a person, animal or thing; style: how pictures look (default %(default)s)"

LARGEST = 16384      # side of a picture in pixels, as in ComfyUI


class UsageError(SystemExit):
    """Ends the program, because the arguments are not understood. The sentence is on stderr already."""

    def __init__(self, sentence: str) -> None:
        super().__init__(2)
        self.sentence = sentence


class Parser(argparse.ArgumentParser):
    """A parser whose usage errors are one sentence. Commands added to it are such parsers, too."""

    below: Any = None      # what `add_subparsers` returned

    def add_subparsers(self, **named: Any) -> Any:
        self.below = super().add_subparsers(**named)
        return self.below

    def error(self, message: str) -> NoReturn:
        if self.below is not None and message.endswith(f"are required: {self.below.dest}"):
            message += f" (one of {', '.join(self.below.choices)})"
        sentence = f"{message}; see '{self.prog} --help'"
        print(f"{self.prog}: {sentence}", file=sys.stderr)
        raise UsageError(sentence)


def file_path(text: str) -> Path:
    """A path, with `~` as the home folder wherever a shell has left it."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"the home folder of {text!r} is not known") from error


def base_name(text: str) -> str:
    """What `--base` names. An empty text would mean the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    return text


def word_names(text: str) -> tuple[str, ...]:
    """The names of words, comma separated."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: names, comma separated, such as "
                                         "dog1,dog2")
    return tuple(typed_name(word) for word in text.split(","))


def some_name(text: str) -> str:
    """The name of a concept. An empty text would mean that none is given."""
    name = typed_name(text)
    if not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: the name of a concept")
    return name


def setting_pair(text: str) -> tuple[str, str]:
    """`key=value` as two texts."""
    key, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form key=value")
    return key.strip(), value.strip()


def _number(kind: type, limit: Limit, text: str) -> Any:
    allows, allowed = limit
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or value != value or not allows(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: "
                                         f"{'a whole number' if kind is int else 'a number'}, {allowed}")
    return value


def whole(limit: Limit) -> Callable[[str], int]:
    """A type for whole numbers within a limit."""
    return partial(_number, int, limit)


def _is_side(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 20 and 8 <= int(text) <= LARGEST


def width_and_height(text: str) -> tuple[int, int]:
    """`256x128` as (256, 128), and `128` as (128, 128)."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(_is_side(side) for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: a side or WIDTHxHEIGHT in "
                                         f"pixels, 8 to {LARGEST} each, such as 128 or 256x128")
    return int(sides[0]), int(sides[-1])


def number(limit: Limit) -> Callable[[str], float]:
    """A type for numbers within a limit."""
    return partial(_number, float, limit)


def _default_of(value: object, other: object, where: str) -> str:
    """`(default 512; 64 for the embedded base)`."""
    def shown(default: object) -> str:
        return {True: "on", False: "off"}[default] if isinstance(default, bool) else f"{default}"

    return f"(default {shown(value)}" + (f"; {shown(other)} for {where})" if other != value else ")")


def add_settings(parser: argparse.ArgumentParser, config: type, others: object, where: str) -> None:
    """Adds a flag for every field. The value is None for flags that are not given.

    Values are read as in `--set`; whether they are allowed is checked by the configuration itself.

    Args:
        others: A configuration with other defaults, named in the help.
        where: When these other defaults hold.
    """
    described, defaults = settings_of(config), config()
    for field in fields(config):
        name, flag = field.name, f"--{field.name.replace('_', '-')}"
        default = _default_of(getattr(defaults, name), getattr(others, name), where)
        text = f"{described[name].help} {default}".replace("%", "%%")
        if field.type == "bool":
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            choices = described[name].choices
            parser.add_argument(flag, type=partial(read_setting, config, name), default=None, help=text,
                                metavar="{" + ",".join(choices) + "}" if choices else None)


def with_plain_booleans(arguments: Sequence[str], config: type) -> list[str]:
    """Rewrites `--flip=false` as `--no-flip`, in every spelling of truth values."""
    flags = {f"--{field.name.replace('_', '-')}": field.name for field in fields(config)
             if field.type == "bool"}
    rewritten = []
    for argument in arguments:
        flag, _, text = argument.partition("=")
        value = read_bool(text) if flag in flags else None
        rewritten.append(argument if value is None else flag if value else f"--no-{flag[2:]}")
    return rewritten


class NamedBase(argparse.Action):
    """Stores `--base`, and that it was given."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        namespace.base, namespace.base_is_named = values, True


def add_base(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Adds the flags that choose the base. default: None = the embedded one, and the command says so."""
    parser.set_defaults(base_is_named=default is not None)
    names = ", ".join(name for name in NAMES if name != EMBEDDED)
    parser.add_argument("--base", type=base_name, action=NamedBase, default=default or EMBEDDED,
                        help="folder of a model in diffusers' layout (SD1.5, SD2, SDXL), or an embedded "
                        f"base, a small model for drawings that ships: {names}. 'embedded' is the one that "
                        f"the bank was made on, else the newest (default {default or EMBEDDED})"
                        + ("" if default else "; without this flag a line says so"))
    parser.add_argument("--device", default="cpu",
                        help="torch device of the base, such as cpu or cuda (default %(default)s)")
