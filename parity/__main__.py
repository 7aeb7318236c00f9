"""`python -m parity`."""

import sys
import traceback

try:
    from parity.cli.main import main
except KeyboardInterrupt:
    print("stopped; nothing is left running", file=sys.stderr)
    sys.exit(130)
except Exception:  # Python's own exit code for it is that of a mismatch
    traceback.print_exc()
    print("the harness cannot be imported: is it installed as its pyproject.toml says?", file=sys.stderr)
    sys.exit(70)

main()
