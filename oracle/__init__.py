"""What does each prompt need? Prompts, judges, menus of plans, labels and the frontier that follows from them."""
