"""Pictures of the benchmark's results."""

from collections.abc import Callable, Sequence
from pathlib import Path

from ..writing.files import atomic_file
from .table import Result

# Rows that belong together, what changes from one to the next, and what is drawn of them.
_SERIES: dict[str, tuple[str, Callable[[Result], float]]] = {
    "size": ("side of the image in pixels", lambda result: result.height),
    "batch": ("images of a step", lambda result: result.batch),
}
_PANELS: dict[str, Callable[[Result], float]] = {
    "images per second": lambda result: result.images,
    "peak memory in MiB": lambda result: result.peak_bytes / 2**20,
}


def draw_plots(results: Sequence[Result], file: Path) -> bool:
    """Draws speed and memory against the size of images, and against the batch, as far as there are such rows.

    Args:
        results: Of the rows `size_...` and `batch_...`, others are passed over.
        file: PNG to be written.

    Returns:
        Whether there was anything to draw.
    """
    from matplotlib.figure import Figure

    chosen = {name: [result for result in results if result.row.split("_")[0] == name] for name in _SERIES}
    chosen = {name: rows for name, rows in chosen.items() if rows}
    if not chosen:
        return False
    figure = Figure(figsize=(9, 3.6 * len(chosen)), layout="constrained")
    all_axes = figure.subplots(len(chosen), len(_PANELS), squeeze=False)
    for (name, rows), axes in zip(chosen.items(), all_axes, strict=True):
        for (title, read), axis in zip(_PANELS.items(), axes, strict=True):
            _draw(axis, name, rows, read)
            axis.set_ylabel(title)
        axes[0].legend(frameon=False)
    with atomic_file(file) as path:
        figure.savefig(path, dpi=110)
    return True


def _draw(axis: object, name: str, rows: Sequence[Result], read: Callable[[Result], float]) -> None:
    from matplotlib.ticker import LogLocator

    label, place = _SERIES[name]
    libraries = dict.fromkeys(result.entrant.split()[0] for result in rows)
    for library in libraries:
        own = sorted((result for result in rows if result.entrant.split()[0] == library), key=place)
        axis.plot([place(result) for result in own], [read(result) for result in own], marker="o", label=library)  # type: ignore[attr-defined]
    places = sorted({place(result) for result in rows})
    axis.set(xlabel=label, xscale="log", yscale="log")  # type: ignore[attr-defined]
    axis.set_xticks(places, [f"{value:g}" for value in places], rotation=45)  # type: ignore[attr-defined]
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # type: ignore[attr-defined]
    axis.yaxis.set_major_formatter("{x:g}")  # type: ignore[attr-defined]
    axis.minorticks_off()  # type: ignore[attr-defined]
    axis.grid(alpha=0.3)  # type: ignore[attr-defined]
