"""A stand-in for a program that times a model on a device: takes and prints the times it is told.

Arguments: rounds, and settings as key=value: ms, reference (a path), outputs (a path), log (a path).
"""

import json
import sys
import time
from collections.abc import Sequence


def main(argv: Sequence[str]) -> None:
    rounds, *rest = argv
    told = dict(item.partition("=")[::2] for item in rest)
    printed = {"samples_ms": [float(told.get("ms", "0.01"))] * int(rounds)}
    if "reference" in told:
        printed["reference_samples_ms"] = [float(told.get("reference_ms", "0.01"))] * int(rounds)
    if "log" in told:
        with open(told["log"], "a", encoding="utf-8") as file:
            file.write(json.dumps(told) + "\n")
    time.sleep(sum(map(sum, printed.values())) / 1e3)
    print("connected to the device")
    print(json.dumps(printed))


if __name__ == "__main__":
    main(sys.argv[1:])
