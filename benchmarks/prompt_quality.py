"""What shortening a prompt costs and saves: the likelihood of the text that follows, exact budgets, and seconds.

    python benchmarks/prompt_quality.py                              # everything, SmolLM2-135M as scorer and reader
    python benchmarks/prompt_quality.py --only "llmlingua" "tail"    # some rows
    python benchmarks/prompt_quality.py --windows 20 --context 1000  # more, longer

Continuation: windows spread over the bundled evaluation text. Of each, `--context` tokens are compressed to `--rate`
of them, the next `--lead` stay whole under every row (they are the method's question: what will be continued), and the
mean NLL of the `--next` tokens after these is what counts. All rows are made by the same engine with the same number of
tokens; nothing is protected. `rise` is the NLL over that with the whole context, with a 95 % bootstrap interval over
windows; `over` says how much lower than each control the NLL is, window by window, with its interval.

Be careful with what this says. The next sentence of a novel hangs on the last ones, so keeping the tail is the control
that is hard to beat; a prompt that is asked about its middle is another matter. `--task facts` asks for that: a
sentence with a fact stands in the context, the lead-in is a question, and the answer is scored.

`cpu` is CPU seconds of compression for 1,000 tokens of text; `pays below` is the prefill speed (tokens a second) of the
reader up to which the tokens saved take longer to read than compressing took, if the machine does nothing else.

Writes results/prompt_quality-DATE.json after every window; rows of the same settings that are there already stay.
"""

import argparse
import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kv_quality import RESULTS, machine

from tcw.data import evaluation_text
from tcw.prompt import Prompt, PromptMethod
from tcw.prompt._reader import Reader
from tcw.prompt.budget import Counter
from tcw.prompt.check import interval
from tcw.prompt.engine import Settings, compress, method_of
from tcw.prompt.scorer import DEFAULT, Scorer, load_scorer

FULL = "full"
CONTROLS = ("head", "tail", "random", "random sentence")
ROWS = {  # name -> SPEC, unit
    "head": ("truncate:side=head", None),
    "tail": ("truncate:side=tail", None),
    "random": ("random", None),
    "random sentence": ("random", "sentence"),
    "llmlingua": ("llmlingua", None),
    "llmlingua sentence": ("llmlingua", "sentence"),
    "llmlingua iterative": ("llmlingua:mode=iterative", None),
    "llmlingua contrast": ("llmlingua:contrast=on", None),
    "llmlingua recent 0.5": ("llmlingua:recent=0.5", None),
    "llmlingua recent 0.8": ("llmlingua:recent=0.8", None),
    "promptdistill": ("promptdistill", None),
    "promptdistill word": ("promptdistill", "word"),
    "asap sentence": ("asap", "sentence"),
}
FACTS = (  # a sentence, what is asked, the answer
    (
        "The spare key hangs behind the blue barrel in the cellar.",
        "Where does the spare key hang?\nAnswer: behind the",
        " blue barrel in the cellar",
    ),
    (
        "Captain Osgood sold the brown mare for forty-seven guineas.",
        "For how many guineas did Captain Osgood sell the mare?\nAnswer:",
        " forty-seven",
    ),
    (
        "The password of the ferryman was saffron lantern.",
        "What was the password of the ferryman?\nAnswer:",
        " saffron lantern",
    ),
    ("Aunt Philippa was born in Trondheim in 1807.", "In which town was Aunt Philippa born?\nAnswer:", " Trondheim"),
)
RATES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
TARGETS = (50, 100, 150, 200, 500, 1000, 2000, 5000)


class Fixed(PromptMethod):
    """Scores that were made before: surprise of words cannot change with the budget."""

    def __init__(self, scores: np.ndarray) -> None:
        self._scores = scores

    def scores(self, prompt: Prompt) -> np.ndarray:
        return self._scores

    def options(self) -> dict[str, Any]:
        return {}


def cases(options: argparse.Namespace, scorer: Scorer) -> list[tuple[str, str, str]]:
    """(context, lead-in, what follows it) of each window."""
    text = evaluation_text()
    spans = scorer.tokens(text).spans
    lead, follow = (options.lead, options.next) if options.task == "next" else (0, 0)
    found = []
    last = len(spans) - options.context - lead - follow - 1
    for i, start in enumerate(np.linspace(0, last, options.windows).astype(int).tolist()):
        cuts = [int(spans[start + n, 0]) for n in (0, options.context, options.context + lead)]
        end = int(spans[start + options.context + lead + follow, 0])
        context = text[cuts[0] : cuts[1]]
        if options.task == "next":
            found.append((context, text[cuts[1] : cuts[2]], text[cuts[2] : end]))
            continue
        fact, question, answer = FACTS[i % len(FACTS)]
        # the fact stands behind the first full stop after its place, which goes from the start to the end
        place = int(len(context) * (0.1 + 0.7 * i / max(1, options.windows - 1)))
        at = context.find(". ", place) + 2 if ". " in context[place:] else place
        found.append((f"{context[:at]}{fact} {context[at:]}", f"\n\n{question}", answer))
    return found


def nll(scorer: Scorer, prompt: str, follow: str) -> float:
    """Mean NLL of what follows a prompt."""
    reader = Reader(scorer, [*scorer.opening, *scorer.tokens(prompt).ids.tolist()])
    return float(reader.score(scorer.tokens(follow).ids.tolist()).mean(dtype=np.float64))


def measure(name: str, case: tuple[str, str, str], scorer: Scorer, options: argparse.Namespace) -> dict[str, float]:
    """One row of one window."""
    context, lead, follow = case
    if name == FULL:
        return {"nll": nll(scorer, context + lead, follow), "tokens": len(scorer.tokens(context))}
    spec, unit = ROWS[name]
    settings = Settings(unit=unit, protect=(), device="cpu")
    cpu, wall = time.process_time(), time.perf_counter()
    made = compress(
        context, spec, rate=options.rate, tokenizer=scorer.tokenizer, question=lead.strip(), settings=settings
    )
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    value = nll(scorer, made.text + lead, follow)
    return {
        "nll": value, "tokens": made.after, "exact": made.after == made.target, "cpu": cpu, "wall": wall,
        "before": made.before,
    }  # fmt: skip


def summary(rows: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """What the windows that every row has say together."""
    done = min(map(len, rows.values()))
    nlls = {name: np.array([window["nll"] for window in found[:done]]) for name, found in rows.items()}
    table: dict[str, dict[str, Any]] = {}
    for name, found in rows.items():
        rise = nlls[name] - nlls[FULL]
        row: dict[str, Any] = {"windows": done, "nll": float(nlls[name].mean()), "rise": float(rise.mean())}
        row["rise_interval"] = interval(rise)
        if name != FULL:
            row["over"] = {
                control: {"mean": float(gain.mean()), "interval": interval(gain)}
                for control in CONTROLS if control in nlls and control != name
                for gain in [nlls[control] - nlls[name]]
            }  # fmt: skip
            before, after = (sum(window[key] for window in found[:done]) for key in ("before", "tokens"))
            cpu = sum(window["cpu"] for window in found[:done])
            row |= {
                "tokens": after / done, "exact": sum(window["exact"] for window in found[:done]),
                "cpu_per_1000": 1000 * cpu / before, "tokens_per_cpu_second": before / cpu,
                "pays_below_tokens_per_second": (before - after) / cpu,
            }  # fmt: skip
        table[name] = row
    return table


def budgets(scorer: Scorer) -> dict[str, Any]:
    """How exactly the engine meets rates and targets, with real scores on a short text and random ones on a long."""
    text = evaluation_text()
    spans = scorer.tokens(text).spans
    short, long = text[: spans[600, 0]], text[: spans[8000, 0]]
    surprise = compress(short, "llmlingua", rate=0.5, tokenizer=scorer.tokenizer, settings=Settings(protect=())).scores
    assert surprise is not None
    counter, found = Counter(scorer.tokenizer), []
    for name, method, source in (("llmlingua", Fixed(surprise), short), ("random", method_of("random"), long)):
        asks = [{"rate": rate} for rate in RATES] + [{"target_tokens": n} for n in TARGETS if n < counter(source)]
        for ask in asks:
            made = compress(source, method, tokenizer=counter, settings=Settings(protect=()), **ask)
            found.append({"scores": name, "tokens": made.before, **ask, "target": made.target, "after": made.after})
    missed = [row for row in found if row["after"] != row["target"]]
    return {"asked": len(found), "missed": missed, "rows": found}


def show(table: dict[str, dict[str, Any]]) -> None:
    print(f"| {'row':24} | rise (95 %)               | over {', '.join(CONTROLS)} | cpu/1000 | pays below |")
    for name, row in table.items():
        low, high = row["rise_interval"]
        over = " ".join(f"{row['over'][c]['mean']:+.3f}" if c in row.get("over", {}) else "      " for c in CONTROLS)
        cost = [f"{row[key]:8.2f}" if key in row else "" for key in ("cpu_per_1000", "pays_below_tokens_per_second")]
        print(f"| {name:24} | {row['rise']:+.3f} ({low:+.3f} .. {high:+.3f}) | {over} | {' | '.join(cost)} |")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("next", "facts"), default="next")
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--context", type=int, default=320, help="tokens to compress")
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--lead", type=int, default=32, help="tokens before the continuation, kept by all")
    parser.add_argument("--next", type=int, default=64, help="tokens to predict")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budgets", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    return parser.parse_args()


def main() -> None:
    """Measure, print, write the results."""
    options = arguments()
    torch.set_num_threads(options.threads)
    scorer = load_scorer(DEFAULT, "cpu")
    keys = ("windows", "context", "rate", "lead", "next", "threads")
    settings = {key: getattr(options, key) for key in keys} | {"model": DEFAULT}
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"prompt_quality-{date}.json"
    report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if report.get("settings") != settings:
        report = {"date": date, "machine": machine(), "settings": settings}
    if options.budgets and "budgets" not in report:
        report["budgets"] = budgets(scorer)
        print(f"budgets: {report['budgets']['asked']} asked for, {len(report['budgets']['missed'])} missed")
    task = report.setdefault(options.task, {"each": {}})
    for number, case in enumerate(cases(options, scorer)):
        for name in (FULL, *options.only):
            have = task["each"].setdefault(name, [])
            if len(have) <= number:
                have.append(measure(name, case, scorer, options))
        task["summary"] = summary(task["each"])
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"\r{number + 1}/{options.windows}", end="", file=sys.stderr, flush=True)
    print("\r", end="", file=sys.stderr)
    show(task["summary"])
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
