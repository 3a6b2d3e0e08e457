"What two runs must agree in: the lines of a log without their times."
import json
from pathlib import Path

import torch

from esam3.core import Part, seed_at


def rows(path: Path) -> list[dict]:
    "The lines of a `metrics.jsonl`, or of another log, without `timing`."
    return [{k: v for k, v in json.loads(line).items() if k != "timing"} for line in path.read_text().splitlines()]


def content(path: Path) -> object:
    "What a file says: of a log without times, of another its bytes."
    return rows(path) if path.suffix == ".jsonl" else path.read_bytes()


def chance(part: Part, *size: int) -> torch.Tensor:
    "Uniform numbers of a part alone."
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed_at(0, part.step, part.number)))
