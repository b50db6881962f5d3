"""What a run has measured: policies, controls, speed, examples, the report."""
