"""What starting textmeta costs, beyond starting Python: seconds, medians of seven alternating runs.

python benchmarks/start_up.py
"""

import subprocess
import sys
import time
from statistics import median

SIDES = {
    "python -c pass": ["-c", "pass"],
    "import textmeta": ["-c", "import textmeta"],
    "textmeta --help": ["-c", "import sys; sys.argv = ['textmeta', '--help']; from textmeta.cli import main; main()"],
}
REPEATS = 7


def main() -> None:
    """Print the table."""
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for turn in range(1 + REPEATS):  # the first fills caches and does not count
        for name, arguments in SIDES.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    bare = median(seconds.pop("python -c pass"))
    for name, times in seconds.items():
        print(f"{name:16} {median(times) - bare:.3f} s beyond a bare python")


if __name__ == "__main__":
    main()
