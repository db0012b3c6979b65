"""How claims are measured: cost, evaluation of runs, the ladder, reports."""
