"""`tcw prompt`: a shorter prompt, text in and text out."""

import contextlib
import io
import json as jsons
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from tcw import methods
from tcw.cli import options
from tcw.cli.output import SCHEMA, out
from tcw.errors import MissingDependency, TcwError, UsageError
from tcw.events import Progress, Report, silent
from tcw.units import show_seconds

if TYPE_CHECKING:
    from tcw.prompt import PromptMethod
    from tcw.prompt.batch import Record
    from tcw.prompt.budget import Counter
    from tcw.prompt.check import Case
    from tcw.prompt.engine import Result, Settings

EXAMPLES = (
    ("half the tokens of a file", "tcw prompt notes.txt --method llmlingua --rate 0.5"),
    ("500 tokens for a question", "tcw prompt a.txt -m promptdistill --target-tokens 500 --question 'Who?'"),
    ("what goes, and do answers hold?", "tcw prompt a.txt -m asap --rate 0.5 --html a.html --check demo:smollm2"),
    ("many prompts", "tcw prompt rag.jsonl --jsonl -m llmlingua --rate 0.3 -o short.jsonl"),
)

STDIN = "-"
COUNTS_WITH = "demo:smollm2"  # its tokenizer, where neither the user nor the method names one


def complete_method(incomplete: str) -> list[str]:
    """Complete a SPEC of a prompt method."""
    names = [name.removeprefix("prompt.") for name in methods.names("prompt")]
    return [name for name in names if name.startswith(methods.canonical(incomplete))]


File = Annotated[str, typer.Argument(metavar="FILE|-", help="A text in UTF-8; `-` reads stdin.", show_default=False)]
Method = Annotated[
    str, typer.Option(
        "--method", "-m", metavar="SPEC", autocompletion=complete_method,
        help="A method of the axis `prompt`, `name` or `name:key=value,key=value`; `tcw methods` lists them.",
    ),
]  # fmt: skip
Rate = Annotated[
    float | None, typer.Option("--rate", metavar="R", help="The share of the tokens that is left, 0 < R <= 1.")
]
Target = Annotated[int | None, typer.Option("--target-tokens", metavar="N", help="The tokens that are left, exactly.")]
Question = Annotated[str, typer.Option("--question", metavar="TEXT", help="What will be asked; never compressed.")]
Instruction = Annotated[
    str, typer.Option("--instruction", metavar="TEXT", help="What will stand before the text; never compressed.")
]
Tokenizer = Annotated[
    str | None, typer.Option(
        "--tokenizer", metavar="MODEL",
        help=f"The reader, whose tokens are counted.  [default: the model that scores, or {COUNTS_WITH}]",
    ),
]  # fmt: skip
UnitOption = Annotated[
    str | None, typer.Option(
        "--unit", metavar="UNIT",
        help="What stays or goes whole: word, sentence, line or paragraph.  [default: the method's]",
    ),
]  # fmt: skip
Keep = Annotated[
    list[str] | None, typer.Option("--keep", metavar="REGEX", help="What it matches stays; may be given again.")
]
Protect = Annotated[
    str | None, typer.Option(
        "--protect", metavar="NAMES",
        help="What stays, of numbers,urls,paths,code,quotes,negation,caps; or all, none.  "
        "[default: all for words, else code]",
    ),
]  # fmt: skip
Elide = Annotated[
    str | None, typer.Option("--elide", metavar="MARK", help="Put where something was left out; {n}: how many units.")
]  # fmt: skip
NoMarkup = Annotated[bool, typer.Option("--no-markup", help="Take `<keep>` in the text for text, not for a mark.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write there, not to stdout.")]
Map = Annotated[
    Path | None, typer.Option("--map", metavar="FILE", help="Write which characters stayed, as JSON: the way back.")
]
Jsonl = Annotated[
    bool, typer.Option("--jsonl", help='Lines {"id", "context", "question"?, "instruction"?, "answer"?} in and out.')
]
Check = Annotated[
    str | None, typer.Option(
        "--check", metavar="MODEL", help="Have MODEL answer before and after, and after truncating to as many tokens.",
    ),
]  # fmt: skip
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", min=0, help="For methods that draw at random.")]


@dataclass(frozen=True)
class Job:
    """What was asked for."""

    method: "PromptMethod"
    settings: "Settings"
    rate: float | None
    target: int | None
    question: str
    instruction: str
    tokenizer: str
    check: str | None
    output: Path | None
    map: Path | None
    html: Path | None

    def compress(
        self, text: str | list[str], question: str, instruction: str, counter: "Counter", told: Report
    ) -> "Result":
        """Compress one text."""
        from tcw.prompt import engine

        return engine.compress(
            text, self.method, rate=self.rate, target_tokens=self.target, tokenizer=counter, question=question,
            instruction=instruction, settings=self.settings, progress=told,
        )  # fmt: skip


def prompt(
    method: Method,
    file: File = STDIN,
    rate: Rate = None,
    target_tokens: Target = None,
    question: Question = "",
    instruction: Instruction = "",
    tokenizer: Tokenizer = None,
    unit: UnitOption = None,
    keep: Keep = None,
    protect: Protect = None,
    elide: Elide = None,
    no_markup: NoMarkup = False,
    output: Output = None,
    map: Map = None,
    html: options.Html = None,
    jsonl: Jsonl = False,
    check: Check = None,
    force: options.Force = False,
    device: options.Device = "auto",
    seed: Seed = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Shorten a prompt to an exact number of tokens.

    Say how much is left with --rate or --target-tokens. What is left are pieces of the text and nothing else, and only
    that goes to stdout. Numbers, URLs, paths, code, quotes, negations and capitals stay, as does what --keep matches
    and what stands in <keep>...</keep>. A text that fits already comes back as it is.
    """
    out.configure(json, quiet, verbose)
    _check_options(rate, target_tokens, jsonl, json, output, html)
    _check_free([output, map, html], force)
    from tcw.prompt import engine
    from tcw.prompt import protect as protection

    made = engine.method_of(method, seed)
    settings = engine.Settings(
        unit, None if protect is None else protection.parse(protect), tuple(keep or ()), elide, not no_markup, device,
        seed,
    )  # fmt: skip
    counts = tokenizer or made.reader() or COUNTS_WITH
    job = Job(made, settings, rate, target_tokens, question, instruction, counts, check, output, map, html)
    _many(job, file) if jsonl else _one(job, _text(file))


def _check_options(
    rate: float | None, target: int | None, jsonl: bool, json: bool, output: Path | None, html: Path | None
) -> None:
    if (rate is None) == (target is None):
        raise UsageError(
            f"{'neither' if rate is None else 'both'} of `--rate` and `--target-tokens` given",
            "say how much is left with one of them: `--rate 0.5` or `--target-tokens 500`",
        )
    if jsonl and html:
        raise UsageError("`--html` shows one prompt, `--jsonl` reads many", "`--map` works with both")
    if jsonl and json and not output:
        raise UsageError("`--json` and the lines of `--jsonl` both go to stdout", "write the lines with `-o FILE`")


def _check_free(paths: list[Path | None], force: bool) -> None:
    given = [path for path in paths if path is not None]
    if len({path.absolute() for path in given}) < len(given):
        raise UsageError("two outputs go to the same file", "give `-o`, `--map` and `--html` names of their own")
    for path in given:
        options.check_free(path, force)
        if not path.absolute().parent.is_dir() or path.is_dir():
            problem = "it is a folder" if path.is_dir() else "its folder is missing"
            raise UsageError(f"cannot write `{path}`: {problem}", "choose another place")


# ---- one prompt


def _one(job: Job, text: str) -> None:
    if not text.strip():
        raise UsageError("there is nothing to compress: the text is empty", "give a FILE, or pipe a text in")
    with out.progress() as progress:
        counter = _counter(job.tokenizer, progress)
        result = job.compress(text, job.question, job.instruction, counter, progress)
        checked = _checked(job, [_case(job, result, counter, None)], progress) if job.check else None
    _write_side_files(job, result)
    if job.output:
        options.write_report(job.output, result.text)
        out.note(f"wrote {job.output}")
    data = result.to_json() | ({"check": checked} if checked else {})
    if out.mode == "json":
        out.result(data, lambda: None, "")
    elif not job.output:
        _check_stdout(result.text)
        out.raw(result.text + ("\n" if sys.stdout.isatty() and not result.text.endswith("\n") else ""))
    _say(data)


def _check_stdout(text: str) -> None:
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        raise UsageError(
            f"stdout takes {sys.stdout.encoding}, and the text has other characters", "use `-o FILE` or PYTHONUTF8=1"
        ) from None


def _write_side_files(job: Job, result: "Result") -> None:
    from tcw.prompt import report

    if job.map:
        found = {"schema": SCHEMA, **report.span_map(result)}
        options.write_report(job.map, jsons.dumps(found, ensure_ascii=False) + "\n")
        out.note(f"wrote {job.map}")
    if job.html:
        options.write_report(job.html, report.render(result))
        out.note(f"wrote {job.html}")


def _text(file: str) -> str:
    """The whole text, character for character. Raises UsageError."""
    with _opened(file) as stream:
        raw = stream.read()
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"`{file}` is not UTF-8: byte {error.start} is {raw[error.start]:#04x}",
            f"convert it: `iconv -f latin1 -t utf-8 {file}`",
        ) from None


@contextlib.contextmanager
def _opened(file: str) -> Iterator[BinaryIO]:
    if file == STDIN:
        if sys.stdin.isatty():
            raise UsageError("no text is given", "name a FILE, or pipe a text in")
        yield getattr(sys.stdin, "buffer", None) or io.BytesIO(sys.stdin.read().encode())
        return
    path = Path(file)
    if path.is_dir() or not path.exists():  # a pipe of the shell, `<(...)`, is no file and can be read
        raise UsageError(
            f"`{file}` is {'a folder' if path.is_dir() else 'not there'}", "name a text file, or `-` for stdin"
        )
    with path.open("rb") as stream:
        yield stream


def _counter(model: str, progress: Report) -> "Counter":
    from tcw.prompt.budget import Counter
    from tcw.runtime.load import tokenizer
    from tcw.source import open_source

    try:
        source = open_source(model, progress=progress)
    except MissingDependency as error:
        raise UsageError(
            f"no tokens can be counted: {error.message}", f"name a `--tokenizer`, or {error.hint}"
        ) from None
    return Counter(tokenizer(source), source.id)


def _say(data: dict[str, Any]) -> None:
    """Tell on stderr what became of a prompt."""
    tokens, kept = data["tokens"], data["fidelity"]
    line = f"{tokens['before']:,} tokens, {tokens['after']:,} left ({100 * data['rate']:.1f} %)"
    if tokens["protected"]:
        line += f", {tokens['protected']:,} of them protected"
    out.note(f"{line}, in {show_seconds(data['seconds'])}; counted with {tokens['counter']}")
    shares = {name: kept[f"{key}_recall"] for name, key in (
        ("numbers", "numbers"), ("identifiers", "identifiers"), ("negations", "negation"),
    )}  # fmt: skip
    found = [f"{name} {100 * share:.0f} %" for name, share in shares.items() if share is not None]
    if found:
        out.note(f"survived: {', '.join(found)}")
    for note in data["notes"]:
        out.note(f"note: {note}")
    _say_checked(data.get("check"))


# ---- many prompts


def _many(job: Job, file: str) -> None:
    from tcw.prompt import batch, report

    before = after = 0
    cases = []
    with _opened(file) as stream, batch.rewindable(stream) as lines, out.progress() as progress:
        total = batch.count(lines)
        lines.seek(0)
        counter = _counter(job.tokenizer, progress)
        started = time.perf_counter()
        with batch.writer(job.output, out.stream) as write, batch.writer(job.map, out.stream) as write_map:
            for done, record in enumerate(batch.read(lines), 1):
                result = _of_record(job, record, counter)
                write(batch.output(record, result))
                if job.map:
                    write_map({"id": record.data["id"], **report.span_map(result)})
                before, after = before + result.before, after + result.after
                if job.check:
                    cases.append(_case(job, result, counter, record))
                progress(Progress("compress", done, total, "prompts"))
        checked = _checked(job, cases, progress) if job.check else None
    for path in filter(None, (job.output, job.map)):
        out.note(f"wrote {path}")
    data: dict[str, Any] = {
        "records": total, "tokens": {"before": before, "after": after, "counter": counter.name},
        "rate": after / max(1, before), "seconds": time.perf_counter() - started,
        **({"check": checked} if checked else {}),
    }  # fmt: skip
    if out.mode == "json":
        out.result(data, lambda: None, "")
    out.note(
        f"{total:,} prompts, {before:,} tokens, {after:,} left ({100 * after / max(1, before):.1f} %), "
        f"in {show_seconds(data['seconds'])}; counted with {counter.name}"
    )
    _say_checked(checked)


def _of_record(job: Job, record: "Record", counter: "Counter") -> "Result":
    question, instruction = record.text("question"), record.text("instruction")
    try:
        return job.compress(
            record.context, job.question if question is None else question,
            job.instruction if instruction is None else instruction, counter, silent,
        )  # fmt: skip
    except TcwError as error:
        raise record.failed(error) from None


# ---- does it still answer?


def _case(job: Job, result: "Result", counter: "Counter", record: "Record | None") -> "Case | None":
    """What a model is asked; None where nothing was left out."""
    from tcw.prompt import engine
    from tcw.prompt.check import Case

    if result.text == result.original:
        return None
    question, instruction, answer = (
        record.text(key) if record else None for key in ("question", "instruction", "answer")
    )
    return Case(
        result.original, result.text, job.question if question is None else question,
        job.instruction if instruction is None else instruction, answer, engine.controls(result, counter),
    )  # fmt: skip


def _checked(job: Job, cases: "list[Case | None]", progress: Report) -> dict[str, Any] | None:
    """Compare answers; None where no prompt was changed."""
    from tcw.prompt.check import check_all, summary

    asked = [case for case in cases if case is not None]
    if not asked or job.check is None:
        return None
    results = check_all(asked, job.check, device=job.settings.device, progress=progress)
    return summary(results, seed=job.settings.seed or 0) | {"results": [result.to_json() for result in results]}


def _say_checked(checked: dict[str, Any] | None) -> None:
    if checked is None:
        return
    out.note(f"answers of {checked['model']}, {checked['answer_tokens']:,} tokens of the answer to the whole prompt:")
    for name, found in checked["variants"].items():
        out.note(
            f"  {name:<10}  {found['tokens']:>8,.0f} tokens  NLL {found['nll']:.3f} ({found['rise']:+.3f})"
            f"  answers equal {100 * found['equal']:.0f} %, words F1 {found['f1']:.2f}"
        )
    out.note(f"verdict: {checked['verdict']}")
