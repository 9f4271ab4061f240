"""How long `import lowbit` and `lowbit --help` take, as a user waits for them: whole processes, medians.

python benchmarks/startup.py [repeats]
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import lowbit": ["-c", "import lowbit"],
    "lowbit --help": ["-m", "lowbit", "--help"],
    "lowbit ship --help": ["-m", "lowbit", "ship", "--help"],
}


def milliseconds(words: list[str]) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return 1000 * (time.perf_counter() - begin)


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 21
    print(f"{platform.platform()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, n = {repeats}")
    for name, words in COMMANDS.items():
        milliseconds(words)  # the first run fills the file cache and writes the byte code
        times = sorted(milliseconds(words) for _ in range(repeats))
        print(f"{name:20} median {statistics.median(times):6.1f} ms   ({times[0]:.1f} to {times[-1]:.1f})")


if __name__ == "__main__":
    main()
