"""Token exits: each new token leaves the layers once a gate is confident."""
