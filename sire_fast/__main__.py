"""`python -m sire_fast` and the command `sire-fast`."""

import sys


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        from sire_fast import cli
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("matplotlib", "rich", "typer"):
            raise
        print("sire-fast: the command line needs the extra train: pip install 'sire_fast[train]'", file=sys.stderr)
        sys.exit(2)
    sys.exit(cli.run())


if __name__ == "__main__":
    main()
