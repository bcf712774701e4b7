"""Quality checks that take minutes: `python -m tests.quality.das`, `python -m tests.quality.sae`."""
