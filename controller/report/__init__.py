"""How good a policy is, against what could be had."""
