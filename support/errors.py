"""One line, without a traceback, for each problem that the user can fix."""
import contextlib
import errno
import multiprocessing
import os
import sys

# What to do about an error, and the parts of its type, its code or its message by which it is recognized.
REMEDIES = {
    "close other programs, or add --num-workers 0": [
        "new thread", "BlockingIOError", "[EMFILE]", "[ENFILE]", "[ENOMEM]"],
    "free some space, or choose another folder": ["[ENOSPC]", "[EDQUOT]"],
    "check its permissions, close it if it is open in another Python or notebook, or choose another folder": [
        "PermissionError"],
    "check the disk or the network drive, and run this script again": [
        "[EIO]", "[ESTALE]", "[ENOTCONN]", "TimeoutError", "ConnectionAbortedError"],
    "close other programs, add --num-workers 0, use a smaller --batch-size (in 03 and 04), or add --device cpu (if a "
    "GPU is used)": [
        "MemoryError", "out of memory", "enough memory", "llocate memory", "nable to allocate", "Invalid buffer size",
        "</torch_"],  # a file in shared memory, by which a worker process passes on a batch
    "a worker process died (too little memory, or a function that it cannot import?): add --num-workers 0": [
        "DataLoader worker (pid", "BrokenPipeError", "ConnectionResetError", "ConnectionRefusedError"],
    "add --num-workers 0, or use a function with a name, at the top of the file, instead of a lambda": [
        "PicklingError", "Can't pickle", "cannot pickle"],
    # after an edit
    "add a crop to the transform, such as transforms.CenterCrop(224)": ["stack expects each tensor to be equal size"],
    "add transforms.ToTensor() to the transform, before Normalize": [
        "PIL.Image.Image", "'Image' object has no attribute 'cpu'"],
    "use transforms.ToTensor(), not PILToTensor": ["should be a float tensor"],
    "use a larger crop, such as CenterCrop(224)": ["Output size is too small", "Kernel size can't be greater"],
    "the 2 of nn.Linear(4096, 2) must be the number of CLASSES": ["is out of bounds."],
    "use a network with features, avgpool and classifier, such as models.vgg13": [
        "object has no attribute 'features'", "object has no attribute 'classifier'"],
    "your train_model does not take criterion and after_epoch: remove both from its call": ["argument 'criterion'"],
    "paste the lecture's functions into the script, after criterion = ...": [
        "name 'device' is not defined", "name 'criterion' is not defined"],
}


class UserError(Exception):
    """A problem that the user can fix. The message names the file or option and says what to do."""

    def _render_traceback_(self):  # IPython prints this instead of a traceback
        return [f"error: {self}"]


def summary(error):
    """Return the type of an error, and the line of its message that says what is wrong."""
    text = f"{type(error).__name__}: {str(error).strip()}".removesuffix(": ")
    return text.splitlines()[-1 if "Traceback" in text else 0]  # a DataLoader passes on an error with its traceback


def remedy(error):
    """Return what to do about an error, or None if it is a bug."""
    text = summary(error)
    if isinstance(error, OSError):  # its message, in the user's language, may also contain the name of a file
        text = f"{type(error).__name__} [{errno.errorcode.get(error.errno)}]"
    for advice, signs in REMEDIES.items():
        if any(sign in text for sign in signs):
            return advice
    return "fix this, or choose another folder" if isinstance(error, OSError) else None


@contextlib.contextmanager
def on_error(path, problem="cannot be written", advice="fix this, or choose another folder"):
    """Convert any error raised inside the block to a UserError that names the file (Python's own message for a full
    disk does not). advice: what to do if the file is missing or its content is the problem."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a damaged file can cause any error
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # the system, not the content
            if error.errno == errno.ENOENT and problem != "cannot be written":
                raise UserError(f"{path} is missing: {advice}") from error
            problem = problem if "cannot" in problem else "cannot be read"
            reason = error.strerror
            advice = advice if error.errno == errno.ENOENT else remedy(error)
        raise UserError(f"{path}: {problem} ({reason}): {advice}") from error


def one_line(error):
    """Return one line that tells the user what to do about an error, or None if the error is a bug."""
    if isinstance(error, UserError):
        # a DataLoader passes on an error of a worker as a long text that ends with "UserError: " and the message
        return " ".join(str(error).rpartition("UserError: ")[2].splitlines())
    line, advice = summary(error), remedy(error)
    if not isinstance(error, OSError):  # which ends with the name of its file
        line = line[:120]
    return f"{line}: {advice}" if advice else None


def report(kind, error, traceback):
    """End a script: one line and status 1 for what the user can fix, 130 after Ctrl-C, a traceback for a bug."""
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
