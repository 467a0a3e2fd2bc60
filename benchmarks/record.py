"""The one form of a results file: device, versions, rows."""

import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def versions() -> dict[str, str]:
    """Versions of what takes part, as far as it is installed."""
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "flag_gems", "flash-attn-4", "liger-kernel"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            found["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError):
            found["driver"] = "unknown"
        if torch.backends.cudnn.is_available():
            found["cudnn"] = str(torch.backends.cudnn.version())
    return found


class Record:
    """Rows of one run, written after each so that a run cut short keeps what it had."""

    def __init__(self, path: Path, device: str, readme: list[list[str]]):
        self._path = path
        self._content: dict[str, Any] = {"device": device, "versions": versions(), "readme": readme, "rows": []}

    def add(self, suite: str, case: str, provider: str, metric: str, value: float | None, unit: str) -> None:
        """Add and print one row; a value of None says that the provider does not serve the case."""
        row = {"suite": suite, "case": case, "provider": provider, "metric": metric, "unit": unit}
        row["value"] = None if value is None else round(value, 3)
        self._content["rows"].append(row)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self._content, indent=1) + "\n", encoding="utf-8")
        print(f"{suite:10} {case:28} {provider:14} {metric:9} {row['value']} {unit}", flush=True)
