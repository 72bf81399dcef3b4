"""Launch runs; used by test_hostile_folders.

python launch_server.py [LAUNCHER,PATHS]   the YAML of a launcher and run folders, as JSON; prints the exit codes
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from runner.config import bind
from runner.tracking.rundir import RunDir

if __name__ == "__main__":
    launcher, paths = json.loads(sys.argv[1])
    print(json.dumps(bind.bind(launcher, "launcher")().launch([RunDir(Path(path)) for path in paths], None)))
