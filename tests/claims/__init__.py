"""Studies to repeat, `python -m tests.claims.NAME`; README.md has what came out."""
