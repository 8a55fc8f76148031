"""support/errors.py: one line, without a traceback, for each problem that the user can fix."""
import errno
import multiprocessing
import re
import runpy
import sys
from types import ModuleType

import pytest
from conftest import ROOT, message, raise_

from support.errors import UserError, on_error, report

NO_WORKERS = "add --num-workers 0"
OUT_OF_MEMORY = ("out of memory: close other programs, add --num-workers 0, use a smaller --batch-size (in 03 and 04), "
                 "or add --device cpu (if a GPU is used)")
OTHER_FOLDER = "fix this, or choose another folder"


@pytest.mark.parametrize("error, line", [
    (UserError("Caught UserError in worker 0.\nsupport.UserError: a.jpg: bad:\nfix"), "a.jpg: bad: fix"),
    (OSError(errno.EMFILE, "Too many", "x"), f"x: Too many: close other programs, or {NO_WORKERS}"),
    (OSError(errno.ENOSPC, "No space"),
     "the operating system reports: No space: free some space, or choose another folder"),
    (OSError(errno.EACCES, "no", "x"), "x: no: check its permissions, close it if it is open in another Python or "
     "notebook, or choose another folder"),
    (OSError(errno.EIO, "no", "x"), "x: no: check the disk or the network drive, and run this script again"),
    (OSError("strange"), f"the operating system reports: strange: {OTHER_FOLDER}"),
    (RuntimeError("unable to allocate shared memory(shm)"),
     f"too little shared memory for worker processes: {NO_WORKERS}"),
    (RuntimeError("can't start new thread"),
     f"this system allows no more threads: close other programs, or {NO_WORKERS}"),
    (AttributeError("Can't pickle local object 'f'\nmore"), "worker processes cannot use this (Can't pickle local "
     f"object 'f'): {NO_WORKERS}, or use a function with a name, at the top of the file, instead of a lambda"),
    *[(error, "a worker process died (too little memory, or a function that it cannot import?): " + NO_WORKERS)
      for error in [RuntimeError("DataLoader worker (pid 1) is killed"), BrokenPipeError(errno.EPIPE, "Broken pipe")]],
    *[(error, OUT_OF_MEMORY) for error in [
        RuntimeError("CUDA out of memory"), MemoryError("Unable to allocate 9 GiB"), RuntimeError("not enough memory"),
        RuntimeError("Cannot allocate memory"), RuntimeError("Invalid buffer size: 9 GB")]]])
def test_an_error_is_one_line_that_says_what_to_do(error, line):
    """Python's own message is a page, and does not say what a student can do."""
    assert message(raise_, error) == f"error: {line}"


@pytest.mark.parametrize("error, line", [
    (FileNotFoundError(errno.ENOENT, "No such file"), "a.pt is missing: ask the teacher"),
    (PermissionError(errno.EACCES, "Permission denied"), "a.pt: cannot be read (Permission denied): check its "
     "permissions, close it if it is open in another Python or notebook, or choose another folder"),
    (KeyError("x\n  y"), "a.pt: damaged (KeyError: 'x\\n y'): ask the teacher"),
    (ValueError("x" * 200), f"a.pt: damaged (ValueError: {'x' * 108}): ask the teacher")],
    ids=["missing", "a problem of the system", "damaged", "a long message"])
def test_advice_about_a_file_depends_on_what_is_wrong(error, line):
    """Who may not read a file must not be told to delete it."""
    with pytest.raises(UserError) as found, on_error("a.pt", "damaged", "ask the teacher"):
        raise error
    assert str(found.value) == line


def test_a_folder_that_vanished_is_named():
    """The disk was unplugged."""
    with pytest.raises(UserError) as found, on_error("out"):
        raise FileNotFoundError(errno.ENOENT, "No such file")
    assert str(found.value) == f"out: cannot be written (No such file): {OTHER_FOLDER}"


def test_a_bug_keeps_its_traceback(capsys):
    """What a student cannot fix must not look like an error of the student."""
    report(ValueError, ValueError("a bug"), None)
    assert capsys.readouterr().err == "ValueError: a bug\n"


def test_a_notebook_shows_one_line_too():
    """IPython prints errors in its own way."""
    assert UserError("a.jpg: bad")._render_traceback_() == ["error: a.jpg: bad"]


def test_ctrl_c_has_the_status_that_a_shell_expects(capsys):
    """So that a loop over the scripts stops too."""
    with pytest.raises(SystemExit, match="130"):
        report(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == "\nstopped by Ctrl-C\n"


@pytest.mark.parametrize("error", [UserError("typed"), KeyboardInterrupt("typed")])
def test_at_the_prompt_errors_look_as_usual(monkeypatch, capsys, error):
    """A student who types along sees the line of the mistake."""
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    report(type(error), error, None)
    assert re.search(r"(UserError|KeyboardInterrupt): typed\n$", capsys.readouterr().err)


def test_a_worker_process_leaves_the_message_to_the_main_process(monkeypatch, capsys):
    """Else each of 16 workers would print it."""
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: True)
    report(UserError, UserError("a.jpg: bad"), None)
    assert capsys.readouterr().err == ""


def test_an_old_python_is_named(monkeypatch):
    """Else the scripts would fail after the training."""
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    with pytest.raises(SystemExit, match=r"error: Python 3\.10 or newer is needed; this is "):
        runpy.run_path(str(ROOT / "support" / "__init__.py"))


def test_another_courses_module_named_common_is_noticed(monkeypatch, tmp_path):
    """A notebook keeps every module that it has imported: ours would not be found, and the reason not understood."""
    other = ModuleType("common")
    other.__file__ = str(tmp_path / "common.py")
    monkeypatch.setitem(sys.modules, "common", other)
    text = message(runpy.run_path, str(ROOT / "support" / "__init__.py"))
    assert text == (f"error: a different module named common is loaded, {other.__file__}: restart the kernel, and run "
                    "this first")
    other.__file__ = str(ROOT / "common.py")
    runpy.run_path(str(ROOT / "support" / "__init__.py"))


def test_a_worker_that_is_starting_leaves_the_report_to_the_main_process(monkeypatch, capsys):
    """On macOS and Windows it may not find a function, and its traceback would stand above the one line."""
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__mp_main__"))
    report(ValueError, ValueError("x"), None)
    assert capsys.readouterr().err == ""


def test_half_a_weights_file_is_called_damaged():
    """PyTorch looks for the end of the file before its beginning: the system calls that an invalid argument."""
    def read():
        with on_error("a.pth", "damaged or unsafe", "give a different file to --weights"):
            raise OSError(errno.EINVAL, "Invalid argument")

    assert message(read) == (
        "error: a.pth: damaged or unsafe (OSError: [Errno 22] Invalid argument): give a different file to --weights")
