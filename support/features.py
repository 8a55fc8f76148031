"""Features on disk: rows that are appended to a file, so that an interrupted run can be resumed."""
import math
import os
import secrets
import time

import numpy as np

from support.errors import on_error
from support.files import load, replace, save
from support.records import differences

ADVICE = "delete it and run this script again"


class FeatureFile:
    """A .npy file of features, (N, ...) float32, to which rows are appended batch by batch, so that memory use does not
    grow with N. If a run is killed, the next one resumes after the last complete batch, `done` rows. A .json file
    beside it contains the record of what it was made from, and "images_per_second" (None if it was a single batch)."""

    def __init__(self, path, shape, record, batch_size):
        self.path, self.record, self.json = path, record, path.with_suffix(".json")
        self.part = None  # the file that rows are appended to; None if all are there
        self.done = shape[0]
        self.times = []  # when each batch was complete, and how many rows there were then
        complete = path.exists() and self.json.exists()
        if complete and (changed := differences(load(self.json, ADVICE), record)):
            print(f"{path.name} was computed with {changed}: recomputing")
            complete = False
        # Rows are appended to a .part file. A .json file beside it contains its record: rows of two kinds never mix.
        for part in {found.with_suffix(".part") for found in path.parent.glob(f"{path.stem}.{'[0-9a-f]' * 8}.*")}:
            json = part.with_suffix(".json")  # it may be missing, if it was damaged and has been deleted
            changed = differences(load(json, ADVICE) if json.exists() else {}, record)
            if not complete and not changed:
                self.part = part
            else:
                print(f"{part.name} removed: " + (f"it was started with {changed}" if changed else "not needed now"))
                with on_error(part, "cannot be removed"):
                    part.unlink(missing_ok=True)
                    json.unlink(missing_ok=True)
        if complete:
            print(f"{path.name}: already computed from the same images, layers, transform and precision")
            return
        if self.part is None:
            self.part = path.with_suffix(f".{secrets.token_hex(4)}.part")
            save(path.parent, {self.part.with_suffix(".json").name: record}, quiet=True)
        with on_error(self.part):
            self.part.touch()
            size = self.part.stat().st_size
            # kept open until finish(), and never truncated on opening: another run may be writing the same rows
            self.file = open(self.part, "r+b")  # noqa: SIM115
            np.lib.format.write_array_header_1_0(self.file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            header, row_bytes = self.file.tell(), 4 * math.prod(shape[1:])
            rows = max(size - header, 0) // row_bytes
            self.done = min(rows, shape[0] - 1) // batch_size * batch_size  # at least one batch is left to compute
            self.file.seek(header + self.done * row_bytes)
        if self.done:
            print(f"{path.name}: resuming after the first {self.done:,} of {shape[0]:,} images")

    def append(self, rows):
        """Append a batch of rows. Flush at once, so that it survives if the run is killed."""
        with on_error(self.part):
            self.file.write(np.ascontiguousarray(rows, dtype=np.float32))
            self.file.flush()
        self.done += len(rows)
        self.times.append((time.perf_counter(), self.done))

    def finish(self):
        """Give the complete file its name, and return its rows."""
        if self.part:
            (start, first), (end, last) = self.times[0], self.times[-1]  # the first batch includes the start of workers
            speed = (last - first) / (end - start) if end > start else None
            # This order ensures that features never lie beside a wrong record, even if the run is killed.
            with on_error(self.path, advice="is another run writing here? Wait for it, then run this script again"):
                self.file.truncate()
                os.fsync(self.file.fileno())
                self.file.close()
                os.stat(self.part)  # if another run has just renamed it, stop before its features are removed
                self.path.unlink(missing_ok=True)
                save(self.path.parent, {self.json.name: {**self.record, "images_per_second": speed}})
                replace(self.part, self.path)
                self.part.with_suffix(".json").unlink(missing_ok=True)
            print(f"saved {self.path}" + (f": {speed:.1f} images/s" if speed else ""))
        return load(self.path, ADVICE)
