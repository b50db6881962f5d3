"""Controllers: predict from the first layers which plans suffice for a prompt."""
