"""The command `livrec-fast`; each subcommand is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module

import click

from . import __version__

COMMANDS = {
    "demo": "livrec_fast.systems.demo.command",
    "info": "livrec_fast.info",
    "validate": "livrec_fast.testing",
    "bench": "livrec_fast.bench",
    "codes": "livrec_fast.codes",
    "run": "livrec_fast.systems.run",
}


class _LazyGroup(click.Group):
    """A group that finds `command` in the module named by COMMANDS."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return import_module(COMMANDS[name]).command if name in COMMANDS else None


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="livrec-fast")
def main() -> None:
    """Fast kernels for live-streaming recommendation: see them work, check them, time them."""
