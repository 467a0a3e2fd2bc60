"""flash-attn-plus {info,verify,bench,warmup,tune}: arguments, exit codes, and a sentence for everything that is wrong.

Exit codes: 0 all is well; 1 the answer is no (a wrong result, a call that nobody serves); 2 the command cannot be done
as it was given; 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence

import flash_attn_plus
from flash_attn_plus import env, selection
from flash_attn_plus.cli import bench, info, output, tune, verify, warmup
from flash_attn_plus.errors import InvalidArgument, NoBackend

PROGRAM = "flash-attn-plus"
COMMANDS = {"info": info, "verify": verify, "bench": bench, "warmup": warmup, "tune": tune}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each adds its own arguments and a function to run."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description="FlashAttention-Plus from the command line.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {flash_attn_plus.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for name, module in COMMANDS.items():
        summary = module.SUMMARY
        command = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=output.Help,
        )
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        command.set_defaults(run=module.run)
    return parser


def _check_environment() -> None:
    """Raise InvalidArgument or NoBackend for a variable of the engine that has no meaning."""
    try:
        env.use_flaggems(), env.debug(), env.batch_invariant(), env.fp32_precision(), selection.forced_backend()
    except ValueError as error:
        raise InvalidArgument(str(error)) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    _open_missing_streams()
    arguments = build_parser().parse_args(argv)
    try:
        _check_environment()
        code = arguments.run(arguments)
        sys.stdout.flush()
    except (InvalidArgument, NoBackend) as error:
        print(f"{PROGRAM} {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM} {arguments.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the pipe has seen enough
        _discard_output()
        return 0
    except OSError as error:  # a disk that is full, a file that went away
        _discard_output()
        print(f"{PROGRAM} {arguments.command}: {error}", file=sys.stderr)
        return 2
    return code


def _open_missing_streams() -> None:
    """Where the caller closed stdout or stderr, write to nowhere."""
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 # until the process ends
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _discard_output() -> None:
    """Let what stdout still holds go nowhere, so that the end of the process does not fail on it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
