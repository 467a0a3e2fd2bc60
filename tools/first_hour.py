"""Time a new user's way, from `git clone` to a trained vision transformer, and record it: python -m tools.first_hour

Everything happens in a temporary folder, with an environment of its own; packages come from pip's index or cache.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.cpu import processor
from tools.results import FOLDER, ROOT

PYTHON = ".venv/bin/python"
STEPS = {
    "git clone": ["git", "clone", "--quiet", str(ROOT), "."],
    "python -m venv .venv": [sys.executable, "-m", "venv", ".venv"],
    "pip install . ./dropin": [PYTHON, "-m", "pip", "install", "--quiet", ".", "./dropin"],
    "pip install scikit-learn": [PYTHON, "-m", "pip", "install", "--quiet", "scikit-learn"],
    "python examples/vision_transformer.py": [PYTHON, "examples/vision_transformer.py"],
}
VERSIONS = (
    "import json, platform, torch; print(json.dumps({'python': platform.python_version(), 'torch': torch.__version__}))"
)


def walk(folder: Path) -> tuple[dict[str, float], str, dict[str, str]]:
    """Seconds of each step, what the last one printed, and the versions that were installed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    seconds, printed = {}, ""
    for name, command in STEPS.items():
        started = time.perf_counter()
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        seconds[name], printed = time.perf_counter() - started, done.stdout
        print(f"{seconds[name]:8.1f} s  {name}", flush=True)
    versions = subprocess.run([PYTHON, "-c", VERSIONS], cwd=folder, env=environment, capture_output=True, check=True)
    return seconds, printed, json.loads(versions.stdout)


def main() -> None:
    """Walk, and write benchmarks/results/first-hour.json."""
    argparse.ArgumentParser(prog="python -m tools.first_hour", description=__doc__.splitlines()[0]).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds, printed, versions = walk(Path(folder))
    accuracy = float(re.findall(r"test accuracy ([\d.]+)%", printed)[-1])
    print(printed)
    seconds["all together"] = sum(seconds.values())
    row = {"suite": "first hour", "provider": "a new user", "metric": "time", "unit": "s"}
    rows = [{**row, "case": name, "value": round(value, 1)} for name, value in seconds.items()]
    rows.append({**row, "case": "digits", "metric": "test accuracy", "value": accuracy, "unit": "%"})
    device = f"{os.cpu_count()} cores of {processor()}, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}"
    content = {"device": device, "versions": versions, "readme": [], "rows": rows}
    (FOLDER / "first-hour.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
