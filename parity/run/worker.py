"""A process that runs some of the cases of one backend: `python -m parity.run.worker FOLDER BACKEND SETTING`."""

import sys
from pathlib import Path

import msgspec

from parity.run.backend import Backend, Setting, resolve
from parity.run.supervisor import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    folder, backend, setting = sys.argv[1:]
    record = msgspec.json.decode(backend, type=Backend)
    resolve(record.run)(record, Path(folder), msgspec.json.decode(setting, type=Setting))
