"""Command-line flags of every script, from the fields and comments of a dataclass; errors of one line."""
import inspect
import math
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints


class UserError(Exception):
    """What the user can mend: shown as one line on stderr, exit code 2."""


def run_main(main):
    """Call main(); a UserError becomes its one line and exit code 2."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def field_comments(config):
    """{field name: the comment on its line}, read from the source of a dataclass and those it extends."""
    comments = {}
    for cls in reversed(config.__mro__[:-1]):
        comments |= dict(re.findall(r"^    (\w+): .*?#\s*(.+)$", inspect.getsource(cls), re.M))
    return comments


def parse_value(key, text, kind):
    """The text of --key=text as an int, float, bool or str."""
    try:
        if kind is bool:
            return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError
        return value
    except (ValueError, KeyError):
        name = {int: "a whole number", float: "a number", bool: "0 or 1"}[kind]
        raise UserError(f"--{key}={text}: expected {name}") from None


def parse_flags(config, presets=None, argv=None):
    """Fill the dataclass `config` from --key=value flags; --help lists its fields with their comments.

    presets: {name: {field: value}}, taken by --preset=NAME before all other flags.
    Raises UserError for an unknown key or a value of the wrong kind.
    """
    argv = sys.argv[1:] if argv is None else argv
    kinds, given = get_type_hints(config), {}
    if "--help" in argv or "-h" in argv:
        print(sys.modules[config.__module__].__doc__, "\nflags:")
        if presets:
            print(f"  --preset={'|'.join(presets)}")
        comments = field_comments(config)
        for f in fields(config):
            print(f"  --{f.name}={f.default:<24}  {comments.get(f.name, '')}" if isinstance(f.default, str)
                  else f"  --{f.name}={f.default!s:<24}  {comments.get(f.name, '')}")
        sys.exit(0)
    for arg in argv:
        key, equals, text = arg.removeprefix("--").partition("=")
        known = key in kinds or (presets and key == "preset")
        if not (arg.startswith("--") and known):
            raise UserError(f"unknown argument {arg!r} (flags are --key=value; --help lists them)")
        if not equals and kinds.get(key) is not bool:
            raise UserError(f"{arg} needs a value: --{key}=...")
        given[key] = text if equals else "1"
    preset = given.pop("preset", None)
    if preset is not None and preset not in presets:
        raise UserError(f"--preset={preset}: choose one of {', '.join(presets)}")
    settings = dict(presets[preset]) if preset else {}
    return config(**settings | {key: parse_value(key, text, kinds[key]) for key, text in given.items()})
