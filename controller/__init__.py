"""Learn to predict, from the first layers of a prompt, which plans are sufficient for it."""
