"""The models that predict what each plan keeps: one file each."""
