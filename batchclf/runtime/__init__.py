"""From pixels to class scores: which provider runs (providers), and the running (classifier)."""
