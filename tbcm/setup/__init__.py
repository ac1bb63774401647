"""From a configuration to what a run works on: networks, text, images, in their precisions."""
