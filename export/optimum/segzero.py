"""`optimum-cli export segzero`: what `segzero export` does, where Optimum's users look for exporters.

Installed as `optimum.commands.register.segzero`: Optimum reads every file of that namespace when it starts, so that
nothing is imported here before it is needed. Options, errors and exit status are those of `segzero export`.
"""

from __future__ import annotations

import argparse
import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from segzero_rt.cli import execute_command, find_command, run_reporting

_COMMAND = "export"


class SegZeroExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]  # Optimum has no types
    """The command that Optimum registers."""

    COMMAND = CommandInfo(name="segzero", help="Export a policy and SAM 2 to a segzero-rt bundle.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        find_command(_COMMAND).configure(parser)

    def run(self) -> None:
        command = find_command(_COMMAND)
        sys.exit(run_reporting(lambda: execute_command(command, self.args), as_json=self.args.json))


REGISTER_COMMANDS = [(SegZeroExportCommand, ExportCommand)]
