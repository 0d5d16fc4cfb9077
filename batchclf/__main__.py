"""The `batchclf` command, also as `python -m batchclf`."""

import os
import signal


def main() -> None:
    """Run the command; until it listens to Ctrl-C, that ends it at once, without a traceback."""
    # The kernel drops what has no handler for the first process of a container.
    if os.getpid() != 1 and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    from batchclf.cli import main as command

    command(prog_name="batchclf")


if __name__ == "__main__":
    main()
