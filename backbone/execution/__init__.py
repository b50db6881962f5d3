"""Run a model under a plan: what is changed on the live model while it runs, and how it is put back."""
