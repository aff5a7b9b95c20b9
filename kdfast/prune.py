# SPDX-License-Identifier: Apache-2.0
"""``python -m kdfast.prune``: score, prune, save, time and judge a ViT without writing code.

See docs/use/pruning.md.
"""

import argparse
import sys
from collections.abc import Sequence

from kdfast.commandline.prune import parser
from kdfast.machine.signals import run_command
from kdfast.pruner.checks import UsageError
from kdfast.pruner.run import run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit status is 2 for a request that cannot be met."""
    options = parser().parse_args(argv)
    return run_command(lambda: guarded(options), f"{options.out} holds no new model")


def guarded(options: argparse.Namespace) -> int:
    """The command after its command line: a request that cannot be met is one line."""
    try:
        run(options)
    except UsageError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
