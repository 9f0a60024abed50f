"""`tcw recipes`: the recipes that come with tcw."""

from tcw import recipe
from tcw.cli import options
from tcw.cli.output import out

EXAMPLES = (
    ("all of them", "tcw recipes"),
    ("the names only", "tcw recipes --quiet"),
)


def recipes(
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """List the ready-made recipes for `tcw compress --recipe`."""
    out.configure(json, quiet, verbose)
    found = [recipe.load(name) for name in recipe.names()]
    rows = [
        row
        for each in found
        for row in ((each.name, each.summary), ("", f"= {', then '.join(step.spec() for step in each.steps)}"))
    ]
    out.result(
        {"recipes": [each.to_json() for each in found]},
        lambda: out.table(("recipe", "what you get"), rows),
        [each.name for each in found],
    )
