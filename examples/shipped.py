"""The shipped model of street scenes, for the command line: `tokenexit segment examples.shipped:build --images ...`."""

from examples import demo, runs
from tokenexit_cli import Network


def build() -> Network:
    """The model with the exits that it has, and how pictures are shown to it."""
    model, about = runs.load(demo.SHIPPED)
    return Network(model, size=about.size, mean=about.mean, std=about.std, classes=about.classes, palette=about.palette)


def frozen() -> Network:
    """Its network alone, without exits, and its final head: for `tokenexit assess`."""
    model, about = runs.load(demo.SHIPPED)
    return Network(
        model.host,
        head=model.head,
        size=about.size,
        mean=about.mean,
        std=about.std,
        classes=about.classes,
        palette=about.palette,
    )
