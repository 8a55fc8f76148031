"""Code that is not part of the lecture. Each module imports only those that stand before it in this list: errors,
progress, files, images, options, run, download, records, features, dataset."""
import sys
from pathlib import Path

from support.errors import UserError

if sys.version_info < (3, 10):  # noqa: UP036 the scripts would fail later, after the training
    raise SystemExit(f"error: Python 3.10 or newer is needed; this is {sys.version.split()[0]}")

# A notebook keeps every module that it has imported, such as the common.py of another course.
loaded = getattr(sys.modules.get("common"), "__file__", None)
if loaded and Path(loaded).resolve().parent != Path(__file__).resolve().parent.parent:
    raise UserError(f"a different module named common is loaded, {loaded}: restart the kernel, and run this first")
