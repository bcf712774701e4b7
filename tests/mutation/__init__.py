"""Small wrong changes, one at a time: which of them does no test notice?

    python -m tests.mutation.cover --out /tmp/lines.json           # once: which tests run which line
    python -m tests.mutation.run --n 90 --seed 1 --lines /tmp/lines.json

`run` draws modules weighted by their lines and makes one change in each draw: a swapped comparison, another
operator, a constant one off, `or` for `and`, a negated condition, another axis, `sum` for `mean`, a `raise`
or a call that is left out. The change is made in a copy of the tree, never in the tree itself; the tests that
run the changed lines are run there, and what fails has noticed it. A seed gives the same changes again on the
same source. Printed is a line for each change and the rate of each package; the exit code is 1 below 95 %.

A line that many tests run is judged by a spread of them, so the rate is a lower bound. What changes nothing
that a user could see stands in `equivalents.txt` with a reason, and is at most a tenth.
"""
