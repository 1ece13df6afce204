"""`livrec-fast run`: train and measure a whole system; each is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module

import click

SYSTEMS = {"fluid": "livrec_fast.systems.fluid.command"}


class _Systems(click.Group):
    """A group that finds `command` in the module named by SYSTEMS."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SYSTEMS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return import_module(SYSTEMS[name]).command if name in SYSTEMS else None


@click.command(name="run", cls=_Systems)
def command() -> None:
    """Train a whole system and compare it with its paper, table by table."""
