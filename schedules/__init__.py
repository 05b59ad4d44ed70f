"""The TVM side of the compiler: fusion, lowering, schedules, memory plan, kernel cache, build and run."""

from .ffi import import_ffi

import_ffi()  # before any module of this folder imports TVM, which would bring torch along
