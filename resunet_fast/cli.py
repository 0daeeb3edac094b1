"""The command line: `python -m resunet_fast <command>`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple, NoReturn


class Command(NamedTuple):
    """A subcommand: what it does and the module whose `main(argv) -> int` does it."""

    summary: str
    module: str


COMMANDS = {
    "info": Command("what is installed, what runs here, and why not the rest", "resunet_fast.info"),
    "demo": Command("train the fast and the plain model side by side", "resunet_fast.demo"),
    "export": Command("write a saved model for other programs", "resunet_fast.export"),
    "predict": Command("segment photographs with a saved model", "resunet_fast.predict"),
    "verify": Command("check every implementation that can run here", "resunet_fast.verify"),
}
# Import names of what the extra "demo" installs.
OPTIONAL_PACKAGES = frozenset(
    {"PIL", "matplotlib", "numpy", "safetensors", "skimage", "sklearn", "tifffile", "tqdm"}
)


class OneLineParser(argparse.ArgumentParser):
    """A command's parser: wrong use is one line, like everything else that goes wrong."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with 2."""
        self.exit(2, f"{self.prog.split()[-1]}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m resunet_fast",
        description="A residual U-Net with fused kernels, validated against plain PyTorch.",
        epilog="Each command explains itself: python -m resunet_fast <command> --help",
    )
    commands = parser.add_subparsers(dest="command", metavar="<command>", required=True)
    for name, command in COMMANDS.items():
        # The command's own parser lives in its module, which is imported only when it runs.
        commands.add_parser(name, help=command.summary, add_help=False)
    return parser


def _load(command: Command) -> Callable[[list[str]], int]:
    entry: Callable[[list[str]], int] = import_module(command.module).main
    return entry


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None reads them from `sys.argv`.

    Returns:
        The exit code: 0 fine, 1 a check failed or some of the inputs could not be used, 2 wrong use
        or nothing usable, 130 interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    if not argv:
        parser.print_help()
        return 2
    name = parser.parse_args(argv[:1]).command
    try:
        return _load(COMMANDS[name])(argv[1:])
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in OPTIONAL_PACKAGES:
            raise
        print(
            f"{name} needs the package {package!r}, which is not installed: "
            'pip install "resunet_fast[demo]"',
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
