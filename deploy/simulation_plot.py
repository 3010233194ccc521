"""Draws what `moefleet simulate` found: times to first token and goodput, policy by policy."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from router.errors import ConfigError
from router.simulate import Comparison

_SUFFIXES = (".png", ".svg", ".pdf")


def check_plotting(path: Path) -> None:
    """Return if a plot can be drawn into a file: to be told before a simulation, not after it.

    Raises:
        ConfigError: matplotlib is missing, the name has no ending of a picture, or there is no such folder.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError("plot needs matplotlib, which is not installed; pip install 'moefleet[plots]'")
    if path.suffix not in _SUFFIXES:
        raise ConfigError(f"plot {path} must end with one of {', '.join(_SUFFIXES)}")
    if not path.parent.is_dir():
        raise ConfigError(f"plot {path}: {path.parent} is no folder; make it or name another")


def plot_comparisons(comparisons: Sequence[Comparison], path: Path) -> None:
    """Draw a row for each fleet size: the shares of requests with a first token by then, and goodput.

    Raises:
        ConfigError: the file cannot be written.
    """
    # Optional: who draws nothing need not install it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4 * len(comparisons)), layout="constrained")
    axes = figure.subplots(len(comparisons), 2, squeeze=False)
    for (times, good), comparison in zip(axes, comparisons, strict=True):
        for result in comparison.results:
            shares = [number / 100 for number in range(1, 101)]
            times.plot(result.ttft_percentiles_s, shares, label=result.policy)
        times.set(xscale="log", xlabel="time to first token, s", ylabel="share of requests served")
        times.set_title(f"{comparison.members} members, {comparison.utilisation:.0%} of capacity at best")
        times.legend()
        good.bar([each.policy for each in comparison.results], [each.goodput for each in comparison.results])
        good.set(ylabel="requests a second within the objective")
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"plot {path} cannot be written: {error}; name another file") from error
