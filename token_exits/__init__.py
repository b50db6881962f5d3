"""Token exits: each new token leaves the layers once a gate is confident (CALM, Schuster et al. 2022)."""
