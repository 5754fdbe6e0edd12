"""Measurements of speed, memory and storage: `python -m benchmarks`.

A benchmark is a module of this package with one function

    run(settings: Settings) -> list[Row]

listed in the dict `BENCHMARKS` of `__main__.py`; its docstring says what is measured and how to read it.
`measure.py` has the vocabulary:

    Settings(device, quick)         what the command line asked for; `quick` means smaller and fewer rounds,
                                    so that all benchmarks together stay under two minutes on two cores
    Row(name, values, unit, aim)    one figure: every measurement of it (the table shows median and spread),
                                    and what it should reach, in words
    interleave(ways, settings)      times functions in turns (A B A B ...), so that a slow minute of the
                                    machine hits all of them alike; returns the seconds of each round by name
    ratios(slow, fast)              how many times faster, round by round
    peak_bytes(function, settings)  the most memory that PyTorch held at once above what it held at the start

A minimal one:

    def run(settings: Settings) -> list[Row]:
        seconds = interleave({"loop": sum_in_loop, "torch": sum_in_torch}, settings)
        return [
            *(Row(name, [1e3 * s for s in values], "ms") for name, values in seconds.items()),
            Row("loop / torch", ratios(seconds["loop"], seconds["torch"]), "x", aim="at least 10"),
        ]
"""
