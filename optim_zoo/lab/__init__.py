"""Many runs: sweeps over configs, the search for a learning rate, and reports that compare runs."""
