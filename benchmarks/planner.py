"""Processor seconds of `treadle plan`, import included, for models of several sizes: `python benchmarks/planner.py`.

    python benchmarks/planner.py gpt2 xl --devices 64

Each search is a process of its own; parameters are described, never drawn (resident memory is printed).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from models import MODELS

HERE = Path(__file__).resolve().parent
FILE = HERE / "contenders" / "planned_models.py"
CASES = {  # what is planned, types of a batch, memory of a device
    "gpt2": ("GPT-2 small", f"{FILE}:Gpt", ["i64[512,1024]"] * 2, "24GB"),
    "xl": ("GPT-2 XL, 48 layers", f"{FILE}:GptXl", ["i64[512,1024]"] * 2, "24GB"),
    "gpt3": ("GPT-3, 96 layers", f"{FILE}:Gpt3", ["i64[512,2048]"] * 2, "80GB"),
    "resnet": ("ResNet-50", f"{FILE}:ResNet50", ["f32[1024,3,224,224]", "i64[1024]"], "24GB"),
    "lstm": ("LSTM, 4 layers", f"{FILE}:Lstm", ["i64[512,128]"] * 2, "24GB"),
    "onnx": ("MiniLM, an ONNX file", str(MODELS["minilm"].file), ["i64[512,128]"] * 2, "24GB"),
}
CLUSTER = ("--bandwidth", "600GB/s,25GB/s", "--latency", "2us,10us", "--devices-per-host", "8", "--flops", "100TFLOPS",
           "--memory-bandwidth", "1.5TB/s")


def search(case: str, devices: int) -> tuple[float, float, str]:
    """Processor seconds, gigabytes and the best layout (or why there is none) of one search."""
    _, what, types, memory = CASES[case]
    job = subprocess.Popen([sys.executable, "-m", "treadle", "plan", what, *types, "--devices", str(devices),
                            "--memory", memory, *CLUSTER], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                           env={**os.environ, "COLUMNS": "200"})
    assert job.stdout is not None
    text = job.stdout.read()
    _, _, used = os.wait4(job.pid, 0)
    found = next((line for line in text.splitlines() if line.startswith(("the best:", "AttributeValueError"))), text)
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1e6, found.removeprefix("the best: ")


def main() -> None:
    """Prints a line for every search."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--devices", type=int, nargs="*", default=[8, 64, 512])
    given = parser.parse_args()
    for case in given.cases or CASES:
        for devices in given.devices:
            seconds, gigabytes, found = search(case, devices)
            print(f"{CASES[case][0]:22} {devices:4} devices {seconds:6.1f} s {gigabytes:5.2f} GB  {found}", flush=True)


if __name__ == "__main__":
    main()
