"""The report of runs: what their folders hold, as plots, tables and one page."""
