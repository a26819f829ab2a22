"""ControlNet preprocessors: from a picture to the picture that a ControlNet is steered by."""
