"""Many runs: seeds, sweeps and folds."""
