"""``python -m runner`` and the console script ``runner``."""

from __future__ import annotations

import sys


def main() -> None:
    from runner import cli, heap

    if cli.may_train(sys.argv[1:]):
        heap.restart()
    sys.exit(cli.run(sys.argv[1:]))


if __name__ == "__main__":
    main()
