"""What the verbs of the command line do, apart from reading arguments and choosing exit statuses."""
