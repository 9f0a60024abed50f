"""Run the tests of an op under many orders of threads, and once under each sanitizer: the long form of its tests.

python -m tests.kernels.host OP [PYTEST OPTIONS]
"""

import os
import subprocess
import sys
from pathlib import Path

WAYS = [
    *({"TCW_HOST_ORDER": order} for order in ("forward", "reverse", *map(str, range(8)))),
    {"TCW_HOST_SANITIZE": "1"},
]


def main(op: str, options: list[str]) -> int:
    """Returns how many ways failed."""
    tests = Path(__file__).resolve().parents[1]
    files = [str(path) for path in sorted(tests.glob(f"test_{op}*.py"))]
    failed = 0
    for way in WAYS:
        sys.stdout.write(f"{way}\n")
        sys.stdout.flush()
        command = [sys.executable, "-m", "pytest", *files, "-p", "no:cacheprovider", *options]
        failed += subprocess.run(command, env={**os.environ, **way}, cwd=tests.parents[1]).returncode != 0
    return failed


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[2:]))
