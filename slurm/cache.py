"""One part of a feature cache (14_feature_cache): `python slurm/cache.py PART PARTS -p recipe sa1b -p replays 4`.

Takes those of stage 1's parameters that decide what is in a cache, and writes what stage 1 will look for when it is
given the same."""
import argparse

import yaml

from esam3.core import check_parameters, pick_device, pick_precision
from esam3.data.batches import load_recipe
from esam3.training.feature_cache import write_cache
from esam3.training.stage1 import check_cache, open_features
from esam3.models.teacher import load_teacher
from esam3.training.loop import pick_workers

DECLARED = {"recipe": (str, "toy"), "teacher": (str, ""), "precision": (str, "auto"), "cache": (str, "int8"),
            "replays": (int, 4), "workers": (int, -1)}


def write_part(part: int, parts: int, recipe: str = "toy", teacher: str = "", precision: str = "auto",
               cache: str = "int8", replays: int = 4, workers: int = -1) -> None:
    "Write what part `part` of `parts` lacks. Errors are those of `write_cache`; `ValueError` for a part that is none."
    if not 0 <= part < parts: raise ValueError(f"part {part} of {parts}: parts are 0 … {parts - 1}")
    told, device = load_recipe(recipe), pick_device()
    check_cache(cache, replays, told["splits"]["train"]["images"])
    precision, vit = pick_precision(device, precision), load_teacher(teacher or told["teacher"]).to(device)
    many = pick_workers(device, workers)
    images, folder, _ = open_features(told, vit, cache, replays, precision, many, parts)
    print(write_cache(folder, vit, images, cache, rank=part, world=parts, workers=many, precision=precision))


if __name__ == "__main__":
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("part", type=int); words.add_argument("parts", type=int)
    words.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    said = words.parse_args()
    given = {name: yaml.safe_load(value) for name, value in said.p}  # as papermill reads them
    check_parameters(DECLARED, given)
    write_part(said.part, said.parts, **given)
