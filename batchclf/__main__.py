"""`python -m batchclf` is the `batchclf` command."""

from batchclf.cli import main

if __name__ == "__main__":
    main(prog_name="batchclf")
