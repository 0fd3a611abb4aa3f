"""What is shown of a study: its page, its tables and progress in the terminal, its copy in W&B."""
