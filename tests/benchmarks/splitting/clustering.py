"""Balanced clustering of a layer's neurons: against k-means-constrained, at the largest size, and CMoE's assignment.

(a) 11,008 rows of 4,096 into 16, by upcycle and by k-means-constrained 0.9.1, each in a process of its own, in turn, with
the same seeds, one seeding and up to 300 iterations (both stop by themselves long before), with all processors for each unless
told otherwise. Timed is the clustering alone, without imports and reading. The rows have length 1; before that, each is one of
32 random directions
(the i-th chosen with a weight of i^-1/2, so that the natural clusters are twice as many and of very unequal size) plus
noise: twice as long as the direction ("clear"), or six times ("faint", nearer to the rows of a weight matrix).
For the faint rows an inertia within 1% says little, since all clusters together explain little; so the share of the
variance that is explained is shown for both. (b) 14,336 rows of 8,192 into 64. (c) CMoE's assignment of 11,008 neurons to 16
experts from 8,192 tokens with 10 marks each: the memory it takes beyond what the process holds already, against the fp32
cost of 11,008 x 11,008 it avoids; and at 2,048 neurons its cost against scipy's optimum for that matrix.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]

from measure import Cost, Row, mega, report, run
from smollm2 import cache_folder

PEER = "k-means-constrained==0.9.1"
LEAST_SPEEDUP, MOST_INERTIA, LEAST_MEMORY, MOST_COST = 20.0, 1.01, 50.0, 1.01
SHAPE, LARGE = (11008, 4096, 16), (14336, 8192, 64)
NOISES = {"clear": 2.0, "faint": 6.0}
EXPERTS, TOKENS, MARKS = 16, 8192, 10
# What k-means-constrained's own environment runs; it knows nothing of this project.
_PEER_PROGRAM = """
import json, sys, time
import numpy as np
from k_means_constrained import KMeansConstrained

rows, out, clusters, seed, iterations = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
x = np.load(rows)
size = len(x) // clusters
KMeansConstrained(2, size_min=64, size_max=64, n_init=1).fit(x[:128])  # loads all code
model = KMeansConstrained(clusters, size_min=size, size_max=size, n_init=1, max_iter=iterations, random_state=seed)
started, worked = time.perf_counter(), time.process_time()
model.fit(x)
seconds, worked = time.perf_counter() - started, time.process_time() - worked
json.dump({"seconds": seconds, "worked": worked, "labels": model.labels_.tolist(), "iterations": model.n_iter_}, open(out, "w"))
"""


def main() -> int:
    """Measure, compare, print; 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the peer and 1 GB of data (default: the cache)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side, each with its own seed (default: 3)")
    parser.add_argument("--peer-iterations", type=int, default=300, help="at most, of both sides (default: 300)")
    processors = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=processors, help="threads of each side (default: all)")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)  # what the measured processes do
    arguments = parser.parse_args()
    if arguments.child:
        _CHILDREN[arguments.child[0]](*arguments.child[1:])
        return 0
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(arguments.threads)
    work = (arguments.work or cache_folder() / "benchmarks").absolute()
    work.mkdir(parents=True, exist_ok=True)
    peer = peer_python(work / "k-means-constrained-environment")
    with tempfile.TemporaryDirectory(dir=work) as folder:
        rows: list[Row] = []
        for kind in NOISES:
            rows += compare(kind, peer, Path(folder), arguments.rounds, arguments.peer_iterations)
        rows += [*large_rows(Path(folder)), *marker_rows(Path(folder))]
    title = f"balanced clustering, threads per side: {arguments.threads}, medians of {arguments.rounds} seeds"
    return report(title, ("upcycle", "other"), rows)


def peer_python(environment: Path) -> Path:
    """A Python that has k-means-constrained and nothing of ours, installed when it is not there yet."""
    ready = environment / "ready"
    python = environment / "bin" / "python"
    if not ready.exists() or ready.read_text(encoding="utf-8") != PEER:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(environment)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", PEER], check=True, stdout=sys.stderr)
        ready.write_text(PEER, encoding="utf-8")
    return python


def compare(kind: str, peer: Path, work: Path, rounds: int, iterations: int) -> list[Row]:
    """Both sides in turn on the same rows; the inertia of both is computed here, in fp64."""
    data = work / "rows.npy"
    _child("rows", data, *SHAPE[:2], NOISES[kind])
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
    for seed in range(rounds):
        out = work / "found.json"
        words: list[str | Path] = [data, out, str(SHAPE[2]), str(seed), str(iterations)]
        for side, results in found.items():
            if side == "ours":
                _child("ours", *words)
            else:
                run([peer, "-c", _PEER_PROGRAM, *words])
            result = json.loads(out.read_text(encoding="utf-8"))
            out.with_suffix(".labels").write_text(json.dumps(result.pop("labels")), encoding="utf-8")
            _child("inertia", data, out.with_suffix(".labels"), out)
            result |= json.loads(out.read_text(encoding="utf-8"))
            results.append(result)
            print(f"{kind} seed {seed} {side}: {result}", file=sys.stderr)
    ours, theirs = found.values()
    a, b = (median(run["seconds"] for run in side) for side in (ours, theirs))
    work_a, work_b = (median(run["worked"] for run in side) for side in (ours, theirs))
    inertia = [median(run["inertia"] for run in side) for side in (ours, theirs)]
    explained = [median(run["explained"] for run in side) for side in (ours, theirs)]
    took = ["/".join(str(run["iterations"]) for run in side) for side in (ours, theirs)]
    cells = [f"{value:,.1f}" for value in inertia]
    worse = inertia[0] / inertia[1]
    size = f"{SHAPE[0]:,} x {SHAPE[1]:,} into {SHAPE[2]}, {kind}"
    return [
        Row(
            f"{size}: time", f"{a:.2f} s", f"{b:.2f} s", f"{b / a:.1f}x faster", "at least 20x", b / a >= LEAST_SPEEDUP
        ),
        Row("  processor time", f"{work_a:.2f} s", f"{work_b:.2f} s", f"{work_b / work_a:.1f}x less", ""),
        Row("  inertia", *cells, f"{worse:.4f}x", f"at most {MOST_INERTIA:.2f}x", worse <= MOST_INERTIA),
        Row(
            "  variance explained", *(f"{share:.3%}" for share in explained), f"{explained[0] / explained[1]:.3f}x", ""
        ),
        Row("  full iterations, by seed", *took, "", ""),
    ]


def large_rows(work: Path) -> list[Row]:
    """Time and memory at the largest size of a layer."""
    data, out = work / "rows.npy", work / "found.json"
    _child("rows", data, *LARGE[:2], NOISES["clear"])
    cost = _child("ours", data, out, LARGE[2], 0, 300)
    found = json.loads(out.read_text(encoding="utf-8"))
    held = mega(4 * LARGE[0] * LARGE[1])
    label = f"{LARGE[0]:,} x {LARGE[1]:,} into {LARGE[2]}: time"
    return [
        Row(label, f"{found['seconds']:.2f} s", "", "", "finishes", True),
        Row(f"  peak memory (rows: {held})", mega(cost.peak_bytes), "", "", ""),
    ]


def marker_rows(work: Path) -> list[Row]:
    """Memory and time of CMoE's assignment, and how near the optimum it is."""
    out = work / "found.json"
    _child("markers", out)
    found = json.loads(out.read_text(encoding="utf-8"))
    avoided = 4 * SHAPE[0] ** 2
    less, ratio = avoided / max(found["bytes"], 1), found["small cost"] / found["small optimum"]
    label = f"CMoE's assignment, F = {SHAPE[0]:,}: memory"
    cells = [f"{found[key]:,.0f}" for key in ("small cost", "small optimum")]
    return [
        Row(
            label,
            f"{found['bytes'] / 1e6:.1f} MB",
            mega(avoided),
            f"{less:.0f}x less",
            "at least 50x",
            less >= LEAST_MEMORY,
        ),
        Row("  time", f"{found['seconds']:.2f} s", "", "", ""),
        Row("  cost at F = 2,048 (other: scipy's)", *cells, f"{ratio:.6f}x", "at most 1.01x", ratio <= MOST_COST),
        Row("  time at F = 2,048", f"{found['small seconds']:.2f} s", f"{found['optimum seconds']:.2f} s", "", ""),
    ]


def _child(what: str, *words: object) -> Cost:
    return run([sys.executable, "-P", Path(__file__).resolve(), "--child", what, *map(str, words)])


def _write_rows(path: str, points: str, dimensions: str, noise: str) -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    directions = rng.standard_normal((32, int(dimensions)), dtype=np.float32)
    weights = 1 / np.sqrt(np.arange(1, 33))
    x = directions[rng.choice(32, int(points), p=weights / weights.sum())]
    for i in range(0, len(x), 1024):  # all the noise at once would double the memory
        x[i : i + 1024] += np.float32(noise) * rng.standard_normal(x[i : i + 1024].shape, dtype=np.float32)
        x[i : i + 1024] /= np.linalg.norm(x[i : i + 1024], axis=1, keepdims=True)
    np.save(path, x)


def _cluster(path: str, out: str, clusters: str, seed: str, iterations: str) -> None:
    import numpy as np
    import torch

    from upcycle.splitters.grouping.balanced_kmeans import balanced_kmeans_result

    x = torch.from_numpy(np.load(path))
    balanced_kmeans_result(x[:256], 2)  # loads all code
    started, worked = time.perf_counter(), time.process_time()
    found = balanced_kmeans_result(x, int(clusters), seed=int(seed), max_iter=int(iterations))
    result: dict[str, Any] = {"seconds": time.perf_counter() - started, "worked": time.process_time() - worked}
    result |= {"iterations": found.iterations, "labels": found.labels.tolist()}
    Path(out).write_text(json.dumps(result), encoding="utf-8")


def _inertia(path: str, labels: str, out: str) -> None:
    import numpy as np

    x, label = np.load(path), np.array(json.loads(Path(labels).read_text(encoding="utf-8")))
    assert len(set(np.bincount(label).tolist())) == 1, "the clusters' sizes differ"
    heaps = [x[label == j].astype(np.float64) for j in range(label.max() + 1)]
    within = sum(float(((heap - heap.mean(axis=0)) ** 2).sum()) for heap in heaps)
    mean = sum(heap.sum(axis=0) for heap in heaps) / len(x)
    total = sum(float(((heap - mean) ** 2).sum()) for heap in heaps)
    Path(out).write_text(json.dumps({"inertia": within, "explained": 1 - within / total}), encoding="utf-8")


def _assign_markers(out: str) -> None:
    import numpy as np
    import torch
    from scipy.optimize import linear_sum_assignment

    from upcycle.splitters.grouping.marker_assignment import marker_assignment

    def marks(neurons: int) -> torch.Tensor:
        """Rates fall like 1 / rank; every token is of one of 40 topics, each neuron of one, liked 20 times as much."""
        rng = np.random.default_rng(0)
        rates = -np.log(np.arange(1, neurons + 1, dtype=np.float32))[rng.permutation(neurons)]
        topics, found = rng.integers(0, 40, neurons), []
        for _ in range(TOKENS // 64):
            likes = rates + np.log(20) * (topics == rng.integers(0, 40, (64, 1)))
            # Adding Gumbel noise and taking the largest draws without replacement.
            found.append(np.argpartition(likes + rng.gumbel(size=likes.shape), -MARKS, axis=1)[:, -MARKS:])
        return torch.from_numpy(np.concatenate(found).astype(np.int32))

    def timed(neurons: int, markers: torch.Tensor) -> tuple[Any, float]:
        started = time.perf_counter()
        found = marker_assignment(markers, torch.arange(neurons), EXPERTS, intermediate_size=neurons)
        return found, time.perf_counter() - started

    small = marks(2048)
    found, seconds = timed(2048, small)  # loads all code, too
    result = {"small cost": found.cost, "small seconds": seconds}
    large = marks(SHAPE[0])
    ctypes.CDLL(None).malloc_trim(0)  # what is free already would not be counted
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again from here
    before = _resident("VmRSS")
    found, result["seconds"] = timed(SHAPE[0], large)
    result["bytes"] = _resident("VmHWM") - before
    columns = torch.zeros(2048, TOKENS).index_put_((small.long().T, torch.arange(TOKENS)), torch.tensor(1.0))
    seeds = columns[columns.sum(dim=1).argsort(descending=True, stable=True)[:EXPERTS]]
    cost = torch.cdist(columns, seeds, p=1).double().numpy().repeat(2048 // EXPERTS, axis=1)
    started = time.perf_counter()
    chosen = linear_sum_assignment(cost)
    result |= {"optimum seconds": time.perf_counter() - started, "small optimum": float(cost[chosen].sum())}
    Path(out).write_text(json.dumps(result), encoding="utf-8")


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


_CHILDREN = {"rows": _write_rows, "ours": _cluster, "inertia": _inertia, "markers": _assign_markers}


if __name__ == "__main__":
    sys.exit(main())
