"""One line, without a traceback, for each problem that the user can fix."""
import contextlib
import errno
import multiprocessing
import os
import pickle
import sys

MEMORY_ERRORS = ["out of memory", "llocate memory", "nable to allocate", "not enough memory", "Invalid buffer size"]

# Errors that an edit can cause: a part of Python's or PyTorch's message, and what to do about it.
LARGER = "the transform makes images that are too small for the network: use a larger crop, such as CenterCrop(224)"
TO_TENSOR = "the transform does not make tensors: add transforms.ToTensor(), before Normalize"
VGG = "this needs a network with features, avgpool and classifier, such as models.vgg13"
AFTER_AN_EDIT = {
    "stack expects each tensor to be equal size":
        "the transform makes images of different sizes: add a crop to it, such as transforms.CenterCrop(224)",
    "PIL.Image.Image": TO_TENSOR, "'Image' object has no attribute 'cpu'": TO_TENSOR,
    "Output size is too small": LARGER, "Kernel size can't be greater": LARGER,
    "is out of bounds.": "more classes than outputs: the 2 of nn.Linear(4096, 2) must be the number of CLASSES",
    "argument 'criterion'": "your train_model does not take criterion and after_epoch: remove both from its call",
    "name 'device' is not defined": "paste the lecture's functions into the script, whose variables they use",
    "name 'criterion' is not defined": "paste the lecture's functions after the line criterion = ... of the script",
    "object has no attribute 'features'": VGG, "object has no attribute 'classifier'": VGG,
    "should be a float tensor": "the transform makes whole numbers: use transforms.ToTensor(), not PILToTensor",
}


class UserError(Exception):
    """A problem that the user can fix. The message names the file or option and says what to do."""

    def _render_traceback_(self):  # IPython prints this instead of a traceback
        return [f"error: {self}"]


def remedy(error):
    """Return what to do about an OSError."""
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM):
        return "close other programs, or add --num-workers 0"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space, or choose another folder"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "check its permissions, close it if it is open in another Python or notebook, or choose another folder"
    if error.errno in (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT):
        return "check the disk or the network drive, and run this script again"
    return "fix this, or choose another folder"


@contextlib.contextmanager
def on_error(path, problem="cannot be written", advice="fix this, or choose another folder"):
    """Convert any error raised inside the block to a UserError that names the file (Python's own message for a full
    disk does not). advice: what to do if the file is missing or its content is the problem."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a damaged file can cause any error
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # the system, not the content
            if error.errno == errno.ENOENT and problem != "cannot be written":
                raise UserError(f"{path} is missing: {advice}") from error
            text = error.strerror
            problem = problem if "cannot" in problem else "cannot be read"
            advice = advice if error.errno == errno.ENOENT else remedy(error)
        raise UserError(f"{path}: {problem} ({' '.join(text.split())[:120]}): {advice}") from error


def one_line(error):
    """Return one line that tells the user what to do about an error, or None if the error is a bug."""
    text = str(error).strip()
    if isinstance(error, UserError):
        # a DataLoader passes on an error of a worker as a long text that ends with "UserError: " and the message
        return " ".join(text.rpartition("UserError: ")[2].splitlines())
    for sign, advice in AFTER_AN_EDIT.items():
        if sign in text:
            return f"{text.splitlines()[-1][:120]}: {advice}"
    if "shared memory" in text:
        return "too little shared memory for worker processes: add --num-workers 0"
    if isinstance(error, ConnectionError) or text.startswith("DataLoader worker"):
        return ("a worker process died (too little memory, or a function that it cannot import?): "
                "add --num-workers 0")
    if isinstance(error, MemoryError) or any(sign in text for sign in MEMORY_ERRORS):
        return ("out of memory: close other programs, add --num-workers 0, use a smaller --batch-size (in 03 and 04), "
                "or add --device cpu (if a GPU is used)")
    if "start new thread" in text:
        return "this system allows no more threads: close other programs, or add --num-workers 0"
    if "pickle" in text and isinstance(error, (pickle.PicklingError, AttributeError, TypeError)):
        return (f"worker processes cannot use this ({text.splitlines()[0]}): add --num-workers 0, or use a function "
                "with a name, at the top of the file, instead of a lambda")
    if isinstance(error, OSError):
        return f"{error.filename or 'the operating system reports'}: {error.strerror or text}: {remedy(error)}"
    return None


def report(kind, error, traceback):
    """End a script: one line and status 1 for a problem that the user can fix, 130 after Ctrl-C, a traceback for a
    bug."""
    starting = sys.modules["__main__"].__name__ == "__mp_main__"  # a worker process that is not yet ready, on macOS
    if multiprocessing.parent_process() or starting:
        return  # in a worker process: the main process notices, and reports the reason
    if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.EINVAL):
        try:
            print(flush=True)
        except OSError:  # the reader of our output, such as head, has closed it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None  # the status that a shell reports after SIGPIPE
    line = one_line(error)
    stopped = issubclass(kind, KeyboardInterrupt)
    if hasattr(sys, "ps1") or not (line or stopped):  # sys.ps1 exists only at a prompt, as with python -i
        sys.__excepthook__(kind, error, traceback)
        return
    print("\nstopped by Ctrl-C" if stopped else f"error: {line}", file=sys.stderr)
    if stopped and not sys.flags.interactive:
        raise SystemExit(130)


sys.excepthook = report
