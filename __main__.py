"""`specformer`, and `python -m specformer` the same: see `specformer.scripts.cli`."""

import sys


def main() -> None:
    try:
        from specformer.scripts.cli import app

        app()
    except ModuleNotFoundError as error:
        if (error.name or "specformer").partition(".")[0] == "specformer":
            raise
        sys.exit(f'This command needs {error.name}, which is not installed: pip install "specformer[scripts]"')


if __name__ == "__main__":
    main()
