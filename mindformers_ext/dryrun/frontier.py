"""The plot of a search: memory and time of every plan that was estimated, and those that no other beats in both."""

from pathlib import Path

from mindformers_ext.dryrun.planner import Found
from mindformers_ext.files.atomic import whole_file

GIB = 2**30


def frontier(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (bytes, seconds) that no other point beats in both, by growing memory."""
    found: list[tuple[float, float]] = []
    for point in sorted(points):
        if not found or point[1] < found[-1][1]:
            found.append(point)
    return found


def plot_frontier(found: Found, limit: float, path: Path) -> None:
    """Write the plot as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([b / GIB for b, _ in found.points], [s for _, s in found.points], ".", color="0.7", label="estimated")
    edge = frontier(found.points)
    axes.plot([b / GIB for b, _ in edge], [s for _, s in edge], "-o", label="none is both smaller and faster")
    axes.axvline(limit / GIB, color="red", linestyle="--", label="limit")
    axes.set(xlabel="GiB of the fullest rank", ylabel="seconds a step")
    axes.legend(fontsize=8)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
