"""A process that runs some of the cases of one backend: `python -m parity.run.worker FOLDER BACKEND SETTING`."""

import sys
from pathlib import Path

import msgspec

from parity.run.backend import Backend, Setting, resolve
from parity.run.supervisor import answer, end_with_parent, only_answers

if __name__ == "__main__":
    end_with_parent()
    only_answers()
    folder, backend, setting = sys.argv[1:]
    record = msgspec.json.decode(backend, type=Backend)
    run = resolve(record.run)
    answer("")
    run(record, Path(folder), msgspec.json.decode(setting, type=Setting))
