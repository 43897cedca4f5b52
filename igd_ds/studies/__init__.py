"""Many runs: tables of runs, running them, significance tests and the report."""
