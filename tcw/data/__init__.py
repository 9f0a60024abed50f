"""The small texts that calibration and evaluation use by default; provenance and licence in README.md beside this file.

The two texts share no author, so what is fitted to the one says nothing about the other.
"""

from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent

PROMPTS: tuple[str, ...] = (
    "The harbour lay still under the morning fog, and the first boats were only",
    "def median(values: list[float]) -> float:\n    ordered = sorted(values)\n",
    "Shopping list for Saturday:\n- two loaves of bread\n- a dozen eggs\n-",
    "Question: Why does ice float on water?\nAnswer:",
    "2, 3, 5, 7, 11, 13, 17, 19,",
    "La maison au bout de la rue appartenait autrefois à",
    '{"name": "Ada Lovelace", "born": 1815, "fields": ["mathematics",',
    "Dear Ms. Okafor,\n\nThank you for your letter of 3 March. I am sorry to hear that",
    "Der schnellste Weg vom Bahnhof zum Museum führt",
    "SELECT city, COUNT(*) AS visits FROM trips WHERE",
)
"""Short openings of many kinds: prose, code, lists, questions, numbers, JSON, a letter, SQL, French, German."""


@cache
def calibration_text() -> str:
    """English prose for methods that look at activations: works of 1896 and 1914, 344 kB."""
    return (_FOLDER / "calibration.txt").read_text(encoding="utf-8")


@cache
def evaluation_text() -> str:
    """English prose to measure perplexity on, never to calibrate on: works of 1864 and 1915, 234 kB."""
    return (_FOLDER / "evaluation.txt").read_text(encoding="utf-8")
