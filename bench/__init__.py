"""One script per claim: each measures, prints a table and writes JSON."""
