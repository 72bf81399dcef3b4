"""``python -m runner`` and the console script ``runner``."""

from __future__ import annotations

import sys


def main() -> None:
    from runner.cli import main
    from runner.train.memory import heap

    if main.may_train(sys.argv[1:]):
        heap.restart()
    sys.exit(main.run(sys.argv[1:]))


if __name__ == "__main__":
    main()
