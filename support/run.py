"""Start a script, and print its headings."""
import contextlib
import multiprocessing.connection
import os
import sys
import tempfile
import warnings
from pathlib import Path

try:
    import matplotlib.pyplot as plt
except ValueError:  # the environment variable MPLBACKEND has a value that matplotlib does not know
    print(f"NOTICE: MPLBACKEND={os.environ['MPLBACKEND']} is unknown: the figures are only saved")
    os.environ["MPLBACKEND"] = "agg"
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:  # half imported
        del sys.modules[name]
    import matplotlib.pyplot as plt

from support.errors import UserError
from support.files import HERE, absolute_path, save

FILES_ONLY = {"agg", "cairo", "pdf", "pgf", "ps", "svg", "template"}  # backends of matplotlib without windows
warnings.filterwarnings("ignore", "Got pickle error")  # torch's, of a lambda in worker processes: see support/errors.py
warnings.filterwarnings("ignore", "Glyph .* missing")  # harmless: a file name in a title has unusual characters


def start_run(parser):
    """Parse the command line, choose the folders, set up the figures, and try what the run will need later. Return the
    options. Raises UserError."""
    program, *options = map(str, sys.argv or [""])
    # A notebook or an editor has a command line of its own (ipykernel_launcher.py -f x.json, or an empty name). A link
    # to a script may have any name, and "-" means that Python reads the script from its standard input.
    is_script = program == "-" or any((HERE / Path(x).name).is_file() for x in [program, os.path.realpath(program)])
    args = parser.parse_args(options if is_script else ["--sample", "--show"])
    if hasattr(sys.stdout, "reconfigure"):  # not in IDLE or a notebook
        # a path may contain characters that the console cannot print; each line appears at once, even in a pipe
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    if not is_script:
        print("In a notebook, the options are --sample --show. To choose others, run this and then the cells again:\n"
              f'import sys; sys.argv = ["{parser.prog}", "--limit", "1000", "--show"]')
    if args.output_dir is None:
        size = "sample" if args.sample else f"limit-{args.limit}" if args.limit else "full"
        args.output_dir = absolute_path(HERE / "outputs" / size)
    for folder in [args.data_dir, HERE / "sample"]:
        if folder in args.output_dir.parents and (folder / "train").is_dir():
            raise UserError(f"--output-dir: {args.output_dir} is inside the dataset: choose a folder outside it")
    if args.sample:
        sample = args.data_dir / "sample"
        args.data_dir = sample if all((sample / x).is_dir() for x in ["train", "valid"]) else HERE / "sample"
    set_up_figures(args)
    try_workers(args)
    save(args.output_dir, {".test": ""}, quiet=True)  # what would fail at the end of the run must fail now
    (args.output_dir / ".test").unlink(missing_ok=True)
    return args


def try_workers(args):
    """Try the lock and the socket that worker processes need, and that some clusters and containers do not allow. Load
    the images without worker processes there."""
    if args.num_workers == 0:
        return
    try:
        multiprocessing.Lock()
        multiprocessing.connection.Listener().close()
    except Exception as error:
        print(f"NOTICE: worker processes cannot be used here ({error}; temporary folder: {tempfile.gettempdir()}): "
              "--num-workers 0 is used. If a path is too long, set TMPDIR to a short one on a local disk")
        args.num_workers = 0


def set_up_figures(args):
    """Choose how matplotlib draws: inline in a notebook, in windows with --show, else only into files."""
    ipython = sys.modules.get("IPython")
    if ipython and ipython.get_ipython():  # the session keeps its own settings
        args.show = args.show or "inline" in plt.get_backend()  # in a notebook, %run shows the figures too
    else:
        plt.style.use("default")  # not the user's matplotlibrc: the figures look the same everywhere
        backend = plt.get_backend() if args.show else "agg"
        plt.switch_backend("agg")
        if backend.lower() not in FILES_ONLY and "inline" not in backend:  # a notebook passes its backend on to !python
            with contextlib.suppress(Exception):  # the backend needs a display, or a package
                plt.switch_backend(backend)
    if args.show and plt.get_backend().lower() in FILES_ONLY:
        print("--show: figures cannot be opened in windows here; they are only saved")
        args.show = False


def print_options(args):
    """Print the options of this run, including those that were chosen automatically."""
    given = {name: value for name, value in vars(args).items() if value is not False and value not in (None, [])}
    print("options:", *(f"{name}={value}" for name, value in given.items()))


def banner(heading, time=None, pause=False):
    """Print a heading of the lecture and, if it has a time in the video, a link. If `pause`, then wait for Enter."""
    print(f"\n{('=' if time else '-') * 80}\n{heading}")
    if time:
        hours, minutes, seconds = map(int, time.split(":"))
        print(f"  video from {time}, https://youtu.be/ZhC-DIrCe6A?t={3600 * hours + 60 * minutes + seconds}")
        if pause and sys.stdin and sys.stdin.isatty():
            print("press Enter to continue ", end="", flush=True)
            sys.stdin.readline()
