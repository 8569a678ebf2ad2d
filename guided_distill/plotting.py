"""What we use of matplotlib, which is slow to import, and which only the extra `report` installs."""

from guided_distill.errors import needing

with needing("matplotlib", extra="report", by="a figure"):
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

__all__ = ["Axes", "Figure", "FuncFormatter", "LogLocator", "NullLocator", "colormaps"]
