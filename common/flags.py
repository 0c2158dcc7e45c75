"""Command-line flags from the fields and comments of a dataclass, errors of one line: every script.

    @dataclass
    class Config:
        steps: int = 4              # decoding steps          -> the flag --steps=4, with this help

    def main():
        config = parse_flags(Config)

    if __name__ == "__main__":
        run_main(main)
"""
import inspect
import math
import os
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

from tqdm import tqdm

BOOLS = {"1": True, "true": True, "0": False, "false": False}
KIND_NAMES = {int: "a whole number", float: "a number", bool: "0 or 1"}


class UserError(Exception):
    """An error that the user can correct: shown as one line on stderr, exit code 2."""


def print_error(reason):
    """The one line of an error, on stderr, behind the name of the script."""
    # tqdm.write puts it on a line of its own, not behind a progress bar.
    tqdm.write(f"{Path(sys.argv[0]).name}: {reason}", file=sys.stderr)
    sys.stderr.flush()


def run_main(main):
    """Call main(); a UserError becomes its one line and exit code 2."""
    try:
        sys.exit(main())
    except UserError as error:
        print_error(error)
        sys.exit(2)


def refuse_torchrun():
    """UserError under torchrun: for what runs in one process, which would run once in each."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        raise UserError(f"runs in one process, not in torchrun's {world}: start it with python")


def field_comments(config):
    """{field name: the comment on its line}, from the source of a dataclass and of its bases."""
    comments = {}
    # Bases come first, so that a subclass may give a field another comment.
    for cls in reversed(config.__mro__[:-1]):
        source = inspect.getsource(cls)
        comments |= dict(re.findall(r"^    (\w+): .*?#\s*(.+)$", source, re.M))
    return comments


def print_help(config, presets):
    """The docstring of the dataclass's module, then its fields, their defaults and comments."""
    print(sys.modules[config.__module__].__doc__, "\nflags:")
    if presets:
        print(f"  --preset={'|'.join(presets)}")
    comments = field_comments(config)
    for field in fields(config):
        flag = f"--{field.name}={field.default}"
        print(f"  {flag:<34} {comments.get(field.name, '')}")


def parse_value(key, text, kind):
    """The text of --key=text as an int, float, bool or str."""
    try:
        if kind is bool:
            return BOOLS[text.lower()]
        value = kind(text)
        # float() also reads "nan" and "inf", which no flag has a use for
        if kind is float and not math.isfinite(value):
            raise ValueError
        return value
    except (ValueError, KeyError):
        raise UserError(f"--{key}={text}: expected {KIND_NAMES[kind]}") from None


def split_argument(argument, kinds):
    """"--key=text" -> (key, text), for a key of `kinds`; a bool's "--key" alone is "1"."""
    key, equals, text = argument.removeprefix("--").partition("=")
    if not argument.startswith("--") or key not in kinds:
        raise UserError(f"unknown argument {argument!r} (flags are --key=value; --help lists them)")
    if equals:
        return key, text
    if kinds[key] is not bool:
        raise UserError(f"{argument} needs a value: --{key}=...")
    return key, "1"


def parse_flags(config, presets=None, argv=None):
    """Fill the dataclass `config` from --key=value flags; --help lists its fields and exits.

    presets: {name: {field: value}}. Other flags win over --preset=NAME, wherever it stands.
    argv: a list of arguments; default: the command line's.
    Raises UserError for an unknown key or a value of the wrong kind.
    """
    if argv is None:
        argv = sys.argv[1:]
    if "--help" in argv or "-h" in argv:
        print_help(config, presets)
        sys.exit(0)

    kinds = get_type_hints(config)
    if presets:
        kinds["preset"] = str
    given = dict(split_argument(argument, kinds) for argument in argv)

    settings = {}
    # Only a preset's name: a field called "preset" would be a flag like the others.
    preset = given.pop("preset", None) if presets else None
    if preset is not None:
        if preset not in presets:
            raise UserError(f"--preset={preset}: choose one of {', '.join(presets)}")
        settings = dict(presets[preset])
    for key, text in given.items():
        settings[key] = parse_value(key, text, kinds[key])
    filled = config(**settings)
    check_least(filled, dict(seed=0, workers=0))
    return filled


def check_least(config, least):
    """UserError where a setting of the config is below its value in `least`, {name: value}.

    A config may lack any of them.
    """
    for name, value in least.items():
        if getattr(config, name, value) < value:
            raise UserError(f"--{name}={getattr(config, name):g}: must be at least {value}")
