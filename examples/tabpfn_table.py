"""TabPFN on a table that one process may not hold, through its interface of scikit-learn.

    python examples/tabpfn_table.py                      # 4 ranks, 3,000 rows
    torchrun --nproc-per-node=8 examples/tabpfn_table.py --rows 20000

A small TabPFN v2 with random weights: nothing is downloaded. ``fit`` and ``predict_proba`` are the
user's; between them one line compiles the model in place, with its rows cut. The bytes of live
tensors are counted. A budget lies between what a rank needs and what one process needs: within it
the ranks predict, and one process runs out. Needs tabpfn.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings

import numpy as np
import torch
import torch.distributed as dist
from launch import launch
from measure import PeakBytes, largest, mebibytes
from tabpfn import TabPFNClassifier
from tabpfn.architectures import tabpfn_v2
from tabpfn.base import ModelSpecs
from tabpfn.constants import ModelVersion
from tabpfn.inference_config import InferenceConfig
from torch import nn

import mosaic

CLASSES = 3
Data = tuple[np.ndarray, np.ndarray, np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4, help="processes to start")
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--columns", type=int, default=6)
    parser.add_argument("--inner", choices=["eager", "inductor"], default="eager")
    given = parser.parse_args()
    launch(run, given.ranks, given)


def run(given: argparse.Namespace) -> None:
    """What every rank does."""
    warnings.filterwarnings("ignore", message=".*functools.lru_cache")  # a remark of Dynamo
    ranks = mosaic.init(sp_size=None)
    known, classes, asked = table(given)
    classifier = new_classifier().fit(known, classes)
    # x has all rows, those to learn from first. Keys come by in as many parts as there are ranks.
    method = mosaic.Ring(stages=dist.get_world_size())
    spec = mosaic.ShardingSpec(inputs={"x": "rows batch columns"}, axes={"rows": method})
    for model in classifier.models_:
        model.compile(backend="mosaic", options={"spec": spec, "inner": given.inner})
    begin = time.perf_counter()
    with PeakBytes() as part:
        predicted = classifier.predict_proba(asked)
    took = time.perf_counter() - begin
    needed = int(largest(part.peak))
    off = 0.0
    if ranks.rank() == 0:
        print(f"{given.rows} rows x {given.columns} columns, {os.environ['WORLD_SIZE']} ranks")
        print(f"a rank needs           {mebibytes(needed):>10}  ({took:.1f} s, compiled meanwhile)")
        off = compare((known, classes, asked), predicted, needed)
    dist.barrier()
    if not largest(off) <= 1e-5:
        raise SystemExit("that is too much for float32")


def compare(data: Data, predicted: np.ndarray, needed: int) -> float:
    """The largest difference to one process without Mosaic, which exceeds the budget."""
    known, classes, asked = data
    classifier = new_classifier().fit(known, classes)
    with PeakBytes() as whole:
        expected = classifier.predict_proba(asked)
    off = float(np.abs(predicted - expected).max())
    budget = (needed + whole.peak) // 2
    print(f"one process needs      {mebibytes(whole.peak):>10}: a rank {needed / whole.peak:.1%}")
    print(f"a process may hold     {mebibytes(budget):>10}")
    try:
        with PeakBytes(budget):
            classifier.predict_proba(asked)
        raise SystemExit("one process kept to the budget")
    except MemoryError as error:
        print(f"one process alone:     {error}")
    print(f"largest difference of {len(predicted)} x {CLASSES} predictions {off:.1e}")
    return off


def new_classifier() -> TabPFNClassifier:
    """On a random model. With weights of Prior Labs: leave ``model_path`` out."""
    config, _ = tabpfn_v2.parse_config(
        {"emsize": 48, "nlayers": 1, "nhead": 3, "max_num_classes": CLASSES}
    )
    torch.manual_seed(0)  # the same on each rank
    model = tabpfn_v2.get_architecture(config)
    for parameter in model.parameters():
        if not parameter.any():  # output projections, which training would fill
            nn.init.normal_(parameter, std=0.2)
    defaults = InferenceConfig.get_default("multiclass", ModelVersion.V2)
    return TabPFNClassifier(
        model_path=ModelSpecs(model.eval(), config, defaults),
        n_estimators=1,
        device="cpu",
        ignore_pretraining_limits=True,
        inference_precision=torch.float32,
        memory_saving_mode=False,
        random_state=0,
    )


def table(given: argparse.Namespace) -> Data:
    """Rows whose classes are known, these classes, and rows whose classes are asked for."""
    draw = np.random.default_rng(0)  # the same on each rank
    x = draw.normal(size=(given.rows, given.columns))
    classes = np.digitize(x.sum(1), [-1.0, 1.0])
    x[draw.random(x.shape) < 0.01] = np.nan
    split = given.rows * 2 // 3
    return x[:split], classes[:split], x[split:]


if __name__ == "__main__":
    main()
