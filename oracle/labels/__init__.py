"""Answers of every prompt under every plan, judged and kept: how they are made cheaply, stored and read."""
