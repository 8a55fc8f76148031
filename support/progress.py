"""Show the progress of a long task."""
import sys
import time
from datetime import timedelta


def progress(items, n_items, total, unit="images"):
    """Yield the items. Print to stderr how much of the work is done and its speed in units per second (`total` is the
    number of units): on a terminal in one line, about once a second; elsewhere a line per minute; never before 5 s."""
    on_terminal = sys.stderr.isatty()
    start = time.monotonic()
    due = 5  # seconds after the start
    for i, item in enumerate(items, 1):
        yield item
        seconds = time.monotonic() - start
        if seconds >= due and i < n_items:
            due = seconds + (1 if on_terminal else 60)
            left = timedelta(seconds=round(seconds / i * (n_items - i)))
            line = f"  {i / n_items:4.0%}  {total * i / n_items / seconds:,.1f} {unit}/s  {left} left"
            print(f"{line:<60}", end="\r" if on_terminal else "\n", file=sys.stderr, flush=True)
    if on_terminal and due > 5:
        print(" " * 60, end="\r", file=sys.stderr, flush=True)
