"""support/errors.py: one line, without a traceback, for each problem that the user can fix."""
import errno
import runpy
import sys
from types import ModuleType

import pytest
from conftest import ROOT, message, raise_

from support.errors import UserError, on_error, report

WORKERS = "close other programs, or add --num-workers 0"
DEAD = "a worker process died (too little memory, or a function that it cannot import?): add --num-workers 0"
MEMORY = ("close other programs, add --num-workers 0, use a smaller --batch-size (in 03 and 04), or add "
          "--device cpu (if a GPU is used)")


@pytest.mark.parametrize("error, advice", [
    (OSError(errno.EMFILE, "Too many open files", "a.npy"), WORKERS), (RuntimeError("can't start new thread"), WORKERS),
    (OSError("strange"), "fix this, or choose another folder"),
    *[(NameError(f"name '{name}' is not defined"),
       "paste the lecture's functions into the script, after criterion = ...") for name in ["device", "criterion"]],
    (OSError(errno.EIO, "Failed", f"/{'long' * 40}/a.jpg"),
     "check the disk or the network drive, and run this script again"),
    (AttributeError("Can't pickle local object 'f'\nmore"),
     "add --num-workers 0, or use a function with a name, at the top of the file, instead of a lambda"),
    (RuntimeError("DataLoader worker (pid 1) is killed"), DEAD), (BrokenPipeError(errno.EPIPE, "Broken pipe"), DEAD),
    *[(error, MEMORY) for error in [
        MemoryError(), RuntimeError("CUDA out of memory"), RuntimeError("not enough memory"),
        RuntimeError("unable to allocate shared memory(shm)"), RuntimeError("Cannot allocate memory"),
        RuntimeError("unable to write to file </torch_1_2>"), RuntimeError("Invalid buffer size: 9 GB")]]])
def test_an_error_names_its_cause_and_what_to_do(error, advice):
    """Python's own message is a page, and does not say what a student can do."""
    cause = f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")  # MemoryError has no text
    assert message(raise_, error) == f"error: {cause}: {advice}"


@pytest.mark.parametrize("error, line", [
    (UserError("Caught UserError in worker 0.\nsupport.UserError: a.jpg: bad:\nfix"), "a.jpg: bad: fix"),
    (RuntimeError("Caught RuntimeError in worker 0.\nTraceback:\n  x\nRuntimeError: Output size is too small"),
     "RuntimeError: Output size is too small: use a larger crop, such as CenterCrop(224)")])
def test_a_problem_in_a_worker_is_reported_as_in_the_main_process(error, line):
    """A DataLoader puts its own text before the message."""
    assert message(raise_, error) == f"error: {line}"


def fail(error, *about):
    with on_error(*about):
        raise error


@pytest.mark.parametrize("error, line", [
    (FileNotFoundError(errno.ENOENT, "No such file"), "a.pt is missing: ask the teacher"),
    (KeyError("x\n  y"), "a.pt: damaged (KeyError: 'x\\n y'): ask the teacher"),
    (ValueError("x" * 200), f"a.pt: damaged (ValueError: {'x' * 108}): ask the teacher"),
    (OSError(errno.EINVAL, "as torch says"), "a.pt: damaged (OSError: [Errno 22] as torch says): ask the teacher"),
    (OSError(errno.ENOSPC, "full"), "a.pt: cannot be read (full): free some space, or choose another folder"),
    (OSError(errno.EACCES, "no"), "a.pt: cannot be read (no): check its permissions, close it if it is open in another "
     "Python or notebook, or choose another folder"),
    *[(OSError(code, "no"), "a.pt: cannot be read (no): check the disk or the network drive, and run this script again")
      for code in [errno.EIO, errno.ESTALE]],
    *[(OSError(code, "no"), f"a.pt: cannot be read (no): {WORKERS}")
      for code in [errno.EMFILE, errno.EAGAIN, errno.ENOMEM]],
    (MemoryError(), f"MemoryError: {MEMORY}")])
def test_advice_about_a_file_depends_on_what_is_wrong(error, line):
    """A student must never delete good photos because a network drive failed. Long texts are cut."""
    assert message(fail, error, "a.pt", "damaged", "ask the teacher") == f"error: {line}"


def test_a_folder_that_vanished_is_named():
    """The disk was unplugged."""
    line = message(fail, FileNotFoundError(errno.ENOENT, "No such file"), "out")
    assert line == "error: out: cannot be written (No such file): fix this, or choose another folder"


@pytest.mark.parametrize("error", [
    ValueError("VEIO"), KeyError("TOKENFILE"), AttributeError("'Image' object has no attribute 'resise'"),
    ImportError("cannot import name 'device' from 'common'"), AttributeError("module 'x' has no attribute 'features'"),
    RuntimeError("Caught KeyError in worker 0.\nTraceback:\n  PIL.Image.Image, TimeoutError\nKeyError: 'x'")])
def test_a_bug_keeps_its_traceback(capsys, error):
    """What a student cannot fix must not look like an error of the student, whatever words are in its text."""
    report(type(error), error, None)
    assert capsys.readouterr().err == f"{type(error).__name__}: {error}\n"


def test_a_notebook_shows_one_line_too():
    """IPython prints errors in its own way."""
    assert UserError("a.jpg: bad")._render_traceback_() == ["error: a.jpg: bad"]


@pytest.mark.parametrize("name, value", [
    ("multiprocessing.parent_process", lambda: True), ("__main__.__name__", "__mp_main__")])
def test_a_worker_process_leaves_the_message_to_the_main_process(monkeypatch, capsys, name, value):
    """Each of 16 workers would print it. One that is starting may not find a function, on macOS and Windows."""
    monkeypatch.setattr(name, value)
    report(AttributeError, AttributeError("f"), None)
    assert capsys.readouterr().err == ""


def test_an_old_python_is_named(monkeypatch):
    """Otherwise the scripts would fail after the training."""
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    with pytest.raises(SystemExit, match=r"error: Python 3\.10 or newer is needed; this is "):
        runpy.run_path(str(ROOT / "support" / "__init__.py"))


def test_another_courses_module_named_common_is_noticed(monkeypatch, tmp_path):
    """A notebook keeps every module that it has imported: ours would not be found, and the reason not understood."""
    other = ModuleType("common")
    other.__file__ = str(tmp_path / "common.py")
    monkeypatch.setitem(sys.modules, "common", other)
    text = message(runpy.run_path, str(ROOT / "support" / "__init__.py"))
    assert text.endswith(f"module named common is loaded, {other.__file__}: restart the kernel, and run this first")
