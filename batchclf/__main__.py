"""The `batchclf` command, also as `python -m batchclf`."""

from batchclf.system.interrupt import end_at_once


def main() -> None:
    """Run the command; a signal that comes while it is still being loaded ends it at once."""
    end_at_once()

    from batchclf.cli import main as command

    command(prog_name="batchclf")


if __name__ == "__main__":
    main()
