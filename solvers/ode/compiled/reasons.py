"""Why a solve is not compiled."""

from __future__ import annotations

from ...solution import SolverWarning


class CompileWarning(SolverWarning):
    """A solve that was to be compiled runs without compilation; the message says why."""


class Unfit(Exception):
    """What was asked for cannot be compiled; the message is a clause that says why."""


class Trouble(Exception):
    """The solve met something that is left to the driver that is not compiled, such as samples that break."""
