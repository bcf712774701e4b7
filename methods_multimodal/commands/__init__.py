"""The commands of this package: one module each."""

from __future__ import annotations

import typer

from methods_multimodal.commands.attribute import attribute
from methods_multimodal.commands.circuit import circuit
from methods_multimodal.commands.dissect import dissect
from methods_multimodal.commands.flow import flow
from methods_multimodal.commands.heads import heads
from methods_multimodal.commands.lens import lens
from methods_multimodal.commands.probe import probe
from methods_multimodal.commands.report import report
from methods_multimodal.commands.trace import trace
from methods_multimodal.commands.words import words


def register(app: typer.Typer) -> None:
    """Adds this package's commands to `mm-interp`."""
    for command in (report, attribute, circuit, dissect, heads, lens, words, trace, flow, probe):
        app.command(command.__name__)(command)
