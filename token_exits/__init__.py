"""Token by token: each new token leaves the layers as soon as a gate is sure of it (CALM, Schuster et al. 2022)."""
