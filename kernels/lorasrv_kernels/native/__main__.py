"""Compiles the native code in place: `python -m lorasrv_kernels.native`."""

import sys

from lorasrv_kernels.native import compile_all, find

if __name__ == "__main__":
    failures = compile_all()
    print(*failures, find(), sep="\n")
    sys.exit(bool(failures))
