"""Small models trained on synthetic tasks, and what that says about published claims."""
