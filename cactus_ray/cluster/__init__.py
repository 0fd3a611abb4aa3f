"""Where the work runs: trials, training workers and verifiers on a Ray cluster. Every touch of Ray is in here."""
