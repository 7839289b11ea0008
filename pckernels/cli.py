"""The command line: `pckernels info | verify | train | bench`, or `python -m pckernels ...`.

A command is a module with `add_arguments(parser)` and `run(args) -> exit code`, imported when it is called for.
Exit codes: 0 good, 1 a check failed or a relaxation diverged, 2 bad arguments.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from .errors import InferenceDiverged, Unsupported
from .version import __version__

COMMANDS = {
    "info": "versions, and which backends are available and why",
    "verify": "check the gradients of every rule against autograd, and their convergence against theory",
    "train": "train a network by predictive coding, by backprop, or by both",
    "bench": "time predictive coding beside backprop, loops by hand and other libraries, after checking their numbers",
}
EXTRAS = {"matplotlib": "cli", "PIL": "cli", "sklearn": "cli", "tqdm": "cli", "jinja2": "bench"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; a mistake of the user is a sentence on stderr, never a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in arguments if word in COMMANDS), None)
    args = build_parser(command).parse_args(arguments)
    try:
        return int(import_module(f".{args.command}", __package__).run(args))
    except KeyboardInterrupt:
        return _fail(args.command, "interrupted.", 130)
    except InferenceDiverged as error:
        return _fail(args.command, str(error), 1)
    except ImportError as error:
        return _fail(args.command, _missing(error), 2)
    except (ValueError, TypeError, Unsupported, OSError) as error:
        return _fail(args.command, str(error), 2)


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands, with the arguments of `command` alone: the others need not be imported."""
    parser = argparse.ArgumentParser(prog="pckernels", description="Train PyTorch modules by predictive coding.")
    parser.add_argument("--version", action="version", version=f"pckernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name, text in COMMANDS.items():
        subparser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == command:
            import_module(f".{name}", __package__).add_arguments(subparser)
    return parser


def _missing(error: ImportError) -> str:
    name = (error.name or "").split(".")[0]
    if name in EXTRAS:
        return f"this command needs {name}: pip install 'pckernels[{EXTRAS[name]}]'."
    raise error


def _fail(command: str, sentence: str, code: int) -> int:
    print(f"pckernels {command}: {sentence}", file=sys.stderr)
    return code
