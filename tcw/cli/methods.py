"""`tcw methods`: the catalogue."""

import dataclasses
from typing import Annotated, Any

import typer

from tcw import methods as registry
from tcw.cli import options
from tcw.cli.output import out
from tcw.recipe import from_specs

EXAMPLES = (
    ("all of them", "tcw methods"),
    ("one, with its options", "tcw methods dfloat11"),
)


def methods(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="One method.", autocompletion=options.complete_spec, show_default=False),
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """List the methods, their options, defaults and papers."""
    out.configure(json, quiet, verbose)
    names = [registry.canonical(name)] if name else registry.names()
    cards = [registry.card(each) for each in names]
    data = {"methods": [dataclasses.asdict(card) | {"limits": from_specs([card.name]).limits} for card in cards]}
    out.result(data, lambda: _one(cards[0]) if name else _all(cards), names)


def _all(cards: list[registry.Card]) -> None:
    out.table(
        ("method", "axis", "lossless", "summary"),
        [(card.name, card.family, "yes" if card.lossless else "no", card.summary) for card in cards],
    )
    out.hint("`tcw methods NAME` lists the options of one")


def _one(card: registry.Card) -> None:
    out.facts(
        {
            "method": card.name,
            "axis": card.family,
            "does": card.summary,
            "lossless": "yes" if card.lossless else "no",
            "calibration": "needed" if card.needs_calibration else "not needed",
            "limits": ", ".join(f"{k} {v:g}" for k, v in from_specs([card.name]).limits.items()) or None,
            "paper": card.paper or None,
        }
    )
    if card.options:
        out.text()
        out.table(
            ("option", "default", "what it is"), [(o["name"], _spell(o["default"]), _help(o)) for o in card.options]
        )


def _help(option: dict[str, Any]) -> str:
    choices = ", ".join(_spell(choice) for choice in option["choices"])
    return f"{option['help']} ({choices})" if choices else str(option["help"])


def _spell(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
