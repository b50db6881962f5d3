"""A price with a guarantee, what it promises, and the alarm that watches its assumption."""
