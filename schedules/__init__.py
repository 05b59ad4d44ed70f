"""The TVM side of the compiler: fusion, lowering, schedules, memory plan, kernel cache, build and run."""
