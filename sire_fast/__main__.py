"""`python -m sire_fast` and the command `sire-fast`."""

import os
import sys


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        from sire_fast.lab import cli
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("matplotlib", "rich", "typer"):
            raise
        print("sire-fast: the command line needs the extra train: pip install 'sire_fast[train]'", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    code = cli.run()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # at once: torchrun terminates processes that end later than the first with an error
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
